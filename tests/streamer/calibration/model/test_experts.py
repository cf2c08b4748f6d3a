"""Every expert's Gram against the whole model's own forward pass, hooked, in fp64; and what it takes to get there."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mixtures
import plain_experts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.calibration import expert_grams
from safeshard.streamer.calibration.expert_grams import portions
from safeshard.streamer.calibration.forward import LayerGrams, calibrate
from safeshard.streamer.calibration.hidden_states import SAVED, HiddenStates, UnsavedStates
from safeshard.streamer.calibration.model.weights import Weights
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import open_source
from safeshard.streamer.sources.local import LocalSource

LENGTHS = (5, 30, 1, 7, 24, 32, 12)
KINDS = [*(kind for kind in mixtures.FAMILIES if kind != "qwen3_vl_moe_text"), *mixtures.CALIBRATED, "qwen3_vl_moe"]


def tokens(seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 67, (length,), generator=generator).tolist() for length in LENGTHS]


def make(kind: str, folder: Path) -> nn.Module:
    model = mixtures.multimodal(1) if kind == "qwen3_vl_moe" else mixtures.build(kind, 1)
    mixtures.save(model, folder, fused=kind == "qwen3_5_moe_text")
    return model


def run(folder: Path, samples: list[list[int]], **options: Any) -> list[LayerGrams]:
    weights = Weights(open_checkpoint(open_source(str(folder))))
    options = {"budget_bytes": 1 << 30, "key": "a", "saved": UnsavedStates([folder]), "batch_tokens": 64} | options
    layers = calibrate(
        folder, weights.load, weights.shapes.keys(), samples, device=torch.device("cpu"), dtype=torch.float32,
        experts=weights, **options,
    )  # fmt: skip
    return list(layers)


def by_place(layers: list[LayerGrams]) -> dict[tuple[int, int, str], tuple[Any, torch.Tensor]]:
    return {mixtures.role_of(n): (layer.seen[n], layer.grams[n]) for layer in layers for n in layer.seen}


def assert_plain(found: dict[Any, Any], plain: dict[Any, Any], samples: int) -> None:
    """Tokens, shares and Grams are those of the plain forward pass, of every expert's every linear."""
    layers = {path: int(next(part for part in path.split(".") if part.isdigit())) for path, _ in plain}
    left = set(found)
    for (path, expert), rows in plain.items():
        grams = rows.grams(samples)
        for role in mixtures.ROLES:
            place = (layers[path], expert, role)
            if place not in found:
                assert role == "gate_proj"  # Nemotron has none
                continue
            left.discard(place)
            seen, gram = found[place]
            count, share, expected = grams["inner" if role == "down_proj" else "in"]
            assert (seen.tokens, seen.shared) == (count, pytest.approx(share, abs=1e-12)), place
            assert (gram - expected).norm() <= 1e-5 * expected.norm(), place
            assert torch.equal(gram, gram.T)
    assert not left


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_s_gram_is_that_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    model = make(kind, tmp_path / "m")
    layers = run(tmp_path / "m", tokens(), workers=2)
    found = by_place(layers)
    assert_plain(found, plain_experts.run(model, tokens()), len(LENGTHS))
    assert len({seen.tokens for seen, _ in found.values()}) > 2
    gates = [name for layer in layers for name in layer.seen if mixtures.role_of(name)[2] == "gate_proj"]
    for name in gates:  # one tensor for both
        grams = next(layer.grams for layer in layers if name in layer.seen)
        up = next(n for n in grams if mixtures.role_of(n) == (*mixtures.role_of(name)[:2], "up_proj"))
        assert grams[name] is grams[up]


def test_experts_with_few_tokens_or_none_lean_on_all(tmp_path: Path) -> None:
    """Twelve experts of which two are never chosen: their Grams are shrunk, or stand-ins."""
    model = mixtures.build("qwen3_moe", 1, num_experts=12, num_experts_per_tok=1)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # no token likes one expert, nor its opposite
            parameter.data[:2] = 0.0
    mixtures.save(model, tmp_path / "m")
    found = by_place(run(tmp_path / "m", tokens()))
    assert_plain(found, plain_experts.run(model, tokens()), len(LENGTHS))
    shares = {place: (seen.tokens, seen.shared) for place, (seen, _) in found.items()}
    assert {share for count, share in shares.values() if not count} == {1.0}
    assert any(0 < share < 1 for _, share in shares.values())
    assert any(share == 0 for _, share in shares.values())


def test_portions_batches_workers_and_memory_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("mixtral", tmp_path / "m")
    whole = by_place(run(tmp_path / "m", tokens()))
    monkeypatch.setattr(expert_grams, "PORTION_BYTES", 1)
    layers = run(tmp_path / "m", tokens(), workers=3, budget_bytes=0)
    assert [len(layer.seen) for layer in layers if layer.seen] == [3] * 8
    apart = by_place(layers)
    assert whole.keys() == apart.keys()
    for place, (seen, gram) in whole.items():
        assert apart[place][0] == seen
        assert torch.equal(apart[place][1], gram)


def test_portions_follow_from_sizes() -> None:
    class Sizes:
        count, width, inner = 7, 4096, 1024

    assert portions(Sizes) == [range(3), range(3, 6), range(6, 7)]  # type: ignore[arg-type]
    Sizes.inner = 14336
    assert portions(Sizes) == [range(i, i + 1) for i in range(7)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text", "gpt_oss", "llama4_text"])
def test_experts_are_read_one_at_a_time_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No read and no tensor is larger than one expert's two linears, and each byte of an expert is read once."""
    make(kind, tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    experts = {n: t for n, t in stored.items() if ".experts." in n and t.ndim > 1 and "bias" not in n}
    one = {n: t.nbytes // (len(t) if t.ndim == 3 else 1) for n, t in experts.items()}
    reads: Counter[tuple[int, int]] = Counter()
    most = [0]
    lock, original, load = threading.Lock(), LocalSource.readinto, Weights.expert

    head = 8 + int.from_bytes((tmp_path / "m/model.safetensors").read_bytes()[:8], "little")

    def counted(self: LocalSource, name: str, offset: int, view: memoryview) -> None:
        with lock:
            reads[offset, len(view)] += offset >= head and name.endswith(".safetensors")
        original(self, name, offset, view)

    def loading(self: Weights, *args: Any) -> Any:
        made = load(self, *args)
        most[0] = max(most[0], sum(w.numel() for w in (made.gate, made.up, made.down) if w is not None))
        return made

    monkeypatch.setattr(LocalSource, "readinto", counted)
    monkeypatch.setattr(Weights, "expert", loading)
    run(tmp_path / "m", tokens())
    assert most[0] == 3 * 24 * (10 if kind.startswith("qwen") else 20)
    reads = Counter({place: count for place, count in reads.items() if count})
    assert set(reads.values()) == {1}
    unread = ("lm_head",) if kind != "llama4_text" else ()  # whose base model is the whole
    assert sum(n for _, n in reads) == sum(t.nbytes for n, t in stored.items() if not n.startswith(unread))
    plain = max(t.nbytes for n, t in stored.items() if n not in experts)
    assert max(n for _, n in reads) <= max(plain, *one.values())


def test_an_interrupted_run_goes_on_from_a_layer_s_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("mixtral", tmp_path / "m")
    monkeypatch.setattr("safeshard.streamer.calibration.hidden_states.INTERVAL", 0.0)
    whole = by_place(run(tmp_path / "m", tokens(), saved=HiddenStates([tmp_path / "m"])))
    assert (tmp_path / "m" / SAVED).exists()
    rest = by_place(run(tmp_path / "m", tokens(), saved=HiddenStates([tmp_path / "m"], first=1)))
    assert rest.keys() == {place for place in whole if place[0] == 1}
    assert all(torch.equal(gram, whole[place][1]) for place, (_, gram) in rest.items())


def test_an_expert_that_overflows_is_named_with_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails before the one ahead of it has come to its turn."""
    failed, take_turns = threading.Event(), expert_grams.ExpertGrams._turn

    @contextlib.contextmanager
    def turn(self: Any, index: int) -> Iterator[Any]:
        try:
            with take_turns(self, index) as wait:
                if index == 1 and "layers.1" in self._experts.path:
                    assert failed.wait(60)
                yield wait
        finally:
            if index == 2 and "layers.1" in self._experts.path:
                failed.set()

    monkeypatch.setattr(expert_grams.ExpertGrams, "_turn", turn)
    make("qwen3_moe", tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    stored = load_file(file)
    for name in (n for n in stored if "layers.1" in n and ".experts.2." in n):
        stored[name] = stored[name] * 1e25
    save_file(stored, file)
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.experts\.2: the Gram matrix is not finite .* sample \d"):
        run(tmp_path / "m", tokens(), workers=2)


def test_an_expert_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    from safeshard.streamer import calibrate as command

    make("qwen3_moe", tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    stored = load_file(file)
    gone = "model.layers.1.mlp.experts.2.up_proj"
    stored["model.layers.0.mlp.experts.3.down_proj.weight"] = torch.zeros(24, 11)
    save_file({n: t for n, t in stored.items() if not n.startswith(gone)}, file)
    with pytest.raises(RequestError) as refused:
        command(aligned=tmp_path / "m", output=tmp_path / "out", quiet=True)
    assert {offence.what for offence in refused.value.offences} == {
        gone,
        "model.layers.0.mlp.experts.3.down_proj.weight",
    }
