"""Layer-by-layer calibration against the whole model, its forward hooked in the plainest way."""

import gc
import json
import threading
import time
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.calibration.forward import calibrate
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.calibration.model.skeleton import LayerCall, Skeleton

GOLDENS = Path(__file__).parents[2] / "goldens"
CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MODELS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}
ODD_LENGTHS = [5, 11, 1, 7, 7, 12, 3, 9]


def make_model(folder, kind, **changes):
    common = {"vocab_size": 97} if kind == "gpt2" else COMMON
    config = AutoConfig.for_model(kind, **common | MODELS.get(kind, {}) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: at their initial values they would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (whole model, folder), each built once."""
    built = {}

    def get(kind):
        if kind not in built:
            folder = tmp_path_factory.mktemp(kind)
            built[kind] = (make_model(folder, kind), folder)
        return built[kind]

    return get


def random_tokens(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def run(folder, tokens, *, weights=None, dtype=torch.float32, **options):
    weights = load_file(folder / "model.safetensors") if weights is None else weights
    options = {"budget_bytes": 1 << 30, "key": "a", "saved": HiddenStates([folder])} | options
    return calibrate(folder, weights.__getitem__, weights.keys(), tokens, device=CPU, dtype=dtype, **options)


def all_grams(*args, **kwargs):
    return {name: gram for layer in run(*args, **kwargs) for name, gram in layer.grams.items()}


def hooked_grams(model, tokens):
    """(2 / N) X^T X of every linear inside a decoder layer, fp64 products, one unpadded sample at a time."""
    grams = defaultdict(lambda: 0)
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: grams.__setitem__(
                name, grams[name] + args[0][0].double().T @ args[0][0].double()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D) and "lm_head" not in name
    ]
    with torch.no_grad():
        for sample in tokens:
            model(input_ids=torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: gram * 2 / len(tokens) for name, gram in grams.items()}


def assert_close(grams, expected, tolerance):
    assert grams.keys() == expected.keys()
    errors = {name: float((grams[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    assert max(errors.values()) <= tolerance, errors


def layer_outputs(model, **inputs):
    """What each decoder layer of the whole model returns."""
    outputs = []
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    handles = [
        layer.register_forward_hook(lambda *args: outputs.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
        for layer in layers
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", [[13, 13, 13], [6, 13, 1]], ids=["unpadded", "padded"])
def test_hidden_states_are_the_models_own_bit_for_bit(models, kind, lengths):
    model, folder = models(kind)
    tokens, mask = torch.zeros(3, 13, dtype=torch.int64), torch.zeros(3, 13, dtype=torch.int64)
    for row, sample in enumerate(random_tokens(lengths)):
        tokens[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    weights = load_file(folder / "model.safetensors")
    bare = Skeleton(folder, weights.keys(), torch.float32)
    states = []
    with torch.no_grad():
        with bare.filled(None, weights.__getitem__, CPU):
            hidden, calls = bare.record(tokens, mask)
        for (path, layer), call in zip(bare.layers.items(), calls, strict=True):
            with bare.filled(path, weights.__getitem__, CPU):
                hidden = call.run(layer, hidden)
            states.append(hidden)
    expected = layer_outputs(model, input_ids=tokens, attention_mask=mask)
    assert [s.shape for s in states] == [(3, 13, 32)] * 3
    assert all(torch.equal(state, own) for state, own in zip(states, expected, strict=True))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_grams_match_hooks_on_the_whole_model(models, kind, batch_tokens):
    model, folder = models(kind)
    tokens = random_tokens(ODD_LENGTHS)
    grams = all_grams(folder, tokens, batch_tokens=batch_tokens)
    assert all(gram.dtype == torch.float32 and torch.equal(gram, gram.T) for gram in grams.values())
    assert_close(grams, hooked_grams(model, tokens), 1e-5)


@pytest.mark.parametrize("name", ["llama", "Qwen2"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
def test_goldens(tmp_path, name, batch_tokens):
    expected = load_file(GOLDENS / name / "expected/safedelta-hessians.safetensors")
    tokens = json.loads((GOLDENS / name / "expected/safedelta.json").read_text())["tokens"]
    saved = HiddenStates([tmp_path])  # a slow run saves them, but not among the goldens
    grams = all_grams(GOLDENS / name / "aligned", tokens, batch_tokens=batch_tokens, saved=saved)
    assert_close(grams, expected, 1e-5)


@pytest.mark.parametrize(
    ("kind", "groups"),
    [("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
     ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}])],
)  # fmt: skip
def test_linears_with_one_input_share_one_gram(models, kind, groups):
    tokens = random_tokens(ODD_LENGTHS)
    for index, layer in enumerate(run(models(kind)[1], tokens)):
        found = defaultdict(set)
        for name, gram in layer.grams.items():
            found[id(gram)].add(name.split(".")[-1])
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, groups))
        assert (layer.index, layer.prefix, layer.tokens) == (index, f"model.layers.{index}", sum(ODD_LENGTHS))


def test_hidden_states_on_disk_give_the_same_bytes(models, tmp_path):
    tokens = random_tokens(ODD_LENGTHS)
    for dtype in (torch.float32, torch.bfloat16):
        kept = all_grams(models("llama")[1], tokens, batch_tokens=20, dtype=dtype)
        layers = run(
            models("llama")[1], tokens, batch_tokens=20, dtype=dtype, budget_bytes=0, saved=HiddenStates([tmp_path])
        )
        spilled = {name: gram for layer in layers for name, gram in layer.grams.items()}
        assert all(torch.equal(kept[name], spilled[name]) for name in kept)
        assert not list(tmp_path.iterdir())


def test_a_spill_that_cannot_be_written_is_an_error(models, tmp_path):
    with pytest.raises(RunError, match="no room"):
        next(run(models("llama")[1], random_tokens([4]), budget_bytes=0, saved=HiddenStates([tmp_path / "missing"])))


@pytest.fixture
def frozen():
    """What lives by now is left out by `gc.collect`, which takes as long as there is much."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_one_layer_at_a_time(models, frozen):
    """No weight of another layer, nor of the embeddings, and no earlier Gram is alive while a layer is loaded."""
    folder = models("llama")[1]
    weights = load_file(folder / "model.safetensors")
    alive, most, order = defaultdict(list), 0, []

    def load(name):
        nonlocal most
        gc.collect()
        part = name.split(".")[2] if ".layers." in name else "rest"
        order.append(part)
        array = weights[name].numpy().copy()  # kept alive by every tensor on this memory
        alive[part].append(weakref.ref(array))
        most = max(most, sum(any(ref() is not None for ref in refs) for refs in alive.values()))
        assert not any(ref() is not None for ref in grams)
        return torch.from_numpy(array)

    grams = []
    for layer in calibrate(
        folder, load, weights.keys(), random_tokens([5, 6]),
        device=CPU, dtype=torch.float32, budget_bytes=1 << 20, key="a", saved=HiddenStates([folder]),
    ):  # fmt: skip
        grams += [weakref.ref(gram) for gram in layer.grams.values()]
        assert all(ref() is not None for ref in grams[-7:])
        layer.grams.clear()
    assert most == 1
    assert list(dict.fromkeys(order)) == ["rest", "0", "1", "2"]
    assert len(order) == len(weights) - 1  # all but the output head, each once


def test_tied_embeddings_need_no_output_head(models):
    folder = models("qwen2")[1]
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    assert len(all_grams(folder, random_tokens([4]))) == 21


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_checkpoints_without_or_with_a_second_prefix(models, kind, prefix):
    model, folder = models(kind)
    weights = load_file(folder / "model.safetensors")
    tokens = random_tokens(ODD_LENGTHS)
    expected = hooked_grams(model, tokens)
    for spell in (lambda name: name.removeprefix(prefix), lambda name: prefix + name):
        respelled = {spell(name): tensor for name, tensor in weights.items()}
        grams = all_grams(folder, tokens, weights=respelled)
        assert_close(grams, {spell(name): gram for name, gram in expected.items()}, 1e-5)


def test_the_same_request_gives_the_same_bytes(models):
    folder, tokens = models("llama")[1], random_tokens(ODD_LENGTHS)
    first = all_grams(folder, tokens)
    torch.manual_seed(5)  # the random state of the process plays no part
    again = all_grams(folder, tokens)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("tokens", [[], [[3], []], [[1] * 65]], ids=["none", "empty", "too long"])
def test_samples_that_cannot_run_are_refused(models, tokens):
    with pytest.raises(RequestError):
        run(models("llama")[1], tokens)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_a_gram_that_is_not_finite_names_module_and_sample(models, value, batch_tokens):
    folder = models("gpt2")[1]
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][96] = value  # met by sample 5 alone
    tokens = [[min(token, 95) for token in sample] for sample in random_tokens(ODD_LENGTHS)]
    tokens[5][4] = 96
    with pytest.raises(RunError, match=r"^transformer\.h\.0\.attn\.c_attn: .*calibration sample 5 "):
        list(run(folder, tokens, weights=weights, batch_tokens=batch_tokens))


def test_a_gram_that_overflows_is_an_error(models):
    folder = models("gpt2")[1]
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.ln_1.weight"].fill_(1e25)  # finite inputs, whose squares are not
    with pytest.raises(RunError, match=r"^transformer\.h\.1\.attn\.c_attn: .*not finite"):
        list(run(folder, random_tokens(ODD_LENGTHS), weights=weights))


def test_a_linear_that_does_not_run_is_an_error(models, monkeypatch):
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.gate_proj, .*took no part"):
        next(run(models("llama")[1], random_tokens([4])))


def test_groups_that_change_between_batches_are_an_error(models, monkeypatch):
    """The second batch's up_proj gets a copy of what gate_proj gets."""
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    forward, runs = mlp.forward, []

    def changing(self, x):
        runs.append(self)
        if len(runs) == 2:
            self.up_proj.register_forward_pre_hook(lambda _, args: args[0].clone(), prepend=True)
        return forward(self, x)

    monkeypatch.setattr(mlp, "forward", changing)
    with pytest.raises(RunError, match=r"up_proj: .*changes from batch to batch"):
        next(run(models("llama")[1], random_tokens([4, 5]), batch_tokens=1))


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batches_at_once_give_the_same_bytes(models, kind, workers, monkeypatch):
    """However they overtake each other, and never more of them than asked for."""
    folder, tokens = models(kind)[1], random_tokens(ODD_LENGTHS * 2)
    expected = all_grams(folder, tokens, batch_tokens=12)
    running, most, changed, original = 0, 0, threading.Condition(), LayerCall.run

    def late(self, layer, hidden):
        nonlocal running, most
        with changed:
            running += 1
            most = max(most, running)
            changed.notify_all()
            changed.wait_for(lambda: most >= workers, timeout=60)
        time.sleep(0.01 / hidden.shape[1])  # the first batches, of the shortest samples, come last
        try:
            return original(self, layer, hidden)
        finally:
            with changed:
                running -= 1

    monkeypatch.setattr(LayerCall, "run", late)
    got = all_grams(folder, tokens, batch_tokens=12, workers=workers)
    assert most == workers
    assert got.keys() == expected.keys()
    assert all(torch.equal(gram, expected[name]) for name, gram in got.items())


@pytest.mark.parametrize("slow", [2, 5])
def test_of_batches_that_fail_the_first_is_named(models, monkeypatch, slow):
    """Whichever fails first, and whatever the others wait for."""
    folder = models("gpt2")[1]
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][96] = torch.nan
    tokens = [[min(token, 95) for token in sample] for sample in random_tokens([3, 4, 5, 6, 7, 8])]
    tokens[2][1] = tokens[5][1] = 96
    original = LayerCall.run

    def late(self, layer, hidden):
        time.sleep(0.2 * (hidden.shape[1] == slow + 3))
        return original(self, layer, hidden)

    monkeypatch.setattr(LayerCall, "run", late)
    with pytest.raises(RunError, match=r"calibration sample 2 "):
        list(run(folder, tokens, weights=weights, batch_tokens=1, workers=4))


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path, threads):
    make_model(tmp_path, "llama", hidden_size=64, intermediate_size=1051)  # torch cuts it into uneven pieces
    tokens = random_tokens([61] * 8)
    expected = all_grams(tmp_path, tokens)
    torch.set_num_threads(threads)
    try:
        got = all_grams(tmp_path, tokens)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert got.keys() == expected.keys()
    assert all(torch.equal(gram, expected[name]) for name, gram in got.items())
