"""Safe Delta end to end, against a plain computation: the published sort of all entries, its loop of small steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeshard.kernels.factor import NotPositiveDefiniteError
from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import batch, factors, safedelta
from safeshard.streamer.cli import main
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.options import RunOptions
from safeshard.streamer.run import Result, plan_jobs

GOLDENS = Path(__file__).parents[1] / "goldens"
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LENGTHS = [5, 11, 1, 7, 7, 12, 3, 9, 20, 16, 13, 20]
BLOCK, SUB_BLOCK = 20, 4  # widths of 32 and 48: a ragged last block
PERCDAMP = 0.1  # tiny models have ill-conditioned Grams, where the fp32 of the forward pass would show
STRENGTHS = {"small": 0.5, "medium": 2.0, "huge": 1e9}
TOLERANCE = 1e-5  # of the change's norm, as for the goldens
Tensors = dict[str, Tensor]


class Case:
    """A tiny model on disk, fp32: aligned, a fine-tuned checkpoint, an adapter on all its linears, calibration data."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        common = {"vocab_size": 97} if kind == "gpt2" else COMMON
        config = transformers.AutoConfig.for_model(kind, **common | MODELS[kind])
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in self.model.parameters():  # norms and biases too
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        self.model.save_pretrained(root / "aligned")
        self.config = (root / "aligned/config.json").read_text()
        self.aligned = load_file(root / "aligned/model.safetensors")
        self.finetuned = {name: t + 0.01 * torch.randn_like(t) for name, t in self.aligned.items()}
        self.write("finetuned", self.finetuned)
        self.adapter = self.make_adapter("adapter")
        generator = torch.Generator().manual_seed(1)
        self.tokens = [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps({"input_ids": tokens}) + "\n" for tokens in self.tokens))
        self.grams = self._grams()

    def write(self, name: str, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
        """A checkpoint folder with the aligned model's config."""
        folder = self.root / name
        folder.mkdir()
        (folder / "config.json").write_text(self.config)
        files = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(sorted(tensors))}
        if shards == 1:
            files = dict.fromkeys(tensors, "model.safetensors")
        else:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            save_file({n: t.contiguous() for n, t in tensors.items() if files[n] == file}, folder / file)
        return folder

    def make_adapter(self, name: str, seed: int = 2, rank: int = 3, **config: Any) -> Path:
        """An adapter that PEFT saved: on every decoder linear, A and B random."""
        torch.manual_seed(seed)
        targets = {n.rpartition(".")[2] for n, m in self.model.named_modules() if _is_linear(m)} - {"lm_head"}
        settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets)} | config
        settings["fan_in_fan_out"] = self.kind == "gpt2"
        model = transformers.AutoModelForCausalLM.from_pretrained(self.root / "aligned", dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
            elif "modules_to_save" in key:
                parameter.data.add_(1.0)
        wrapped.save_pretrained(self.root / name, save_embedding_layers=False)
        return self.root / name

    def run(self, out: str, **options: Any) -> tuple[Result, Tensors]:
        """Safe Delta on the adapter, or on what `options` name; its result and its tensors."""
        result = safedelta(**self.options(out, **options))
        return result, tensors_of(self.root / out)

    def options(self, out: str, **options: Any) -> dict[str, Any]:
        defaults = {
            "aligned": self.root / "aligned", "output": self.root / out, "block_size": BLOCK, "sub_block": SUB_BLOCK,
            "dtype": "float32", "quiet": True,
        }  # fmt: skip
        if "factors" not in options:
            defaults |= {"calibration": self.data, "samples": len(LENGTHS), "percdamp": PERCDAMP}
        if "finetuned" not in options:
            defaults |= {"adapter": self.adapter}
        return defaults | options

    def loaded(self, adapter: Path) -> Tensors:
        """Decoder weights (O x I) once PEFT has merged an adapter; all of its tensors must be used."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.root / "aligned", dtype=torch.float32)
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        stored = load_file(adapter / "adapter_model.safetensors")
        assert {key.replace(".default", "") for key in wrapped.state_dict() if "lora_" in key} == {
            key for key in stored if "lora_" in key
        }
        merged = wrapped.merge_and_unload()
        return {name: _weight(module) for name, module in merged.named_modules() if name in self.grams}

    def deltas(self, adapter: Path, tensors: Tensors) -> Tensors:
        """Scaling * B A (fp64) of an adapter's tensors by module, for a config with one scaling."""
        config = json.loads((adapter / "adapter_config.json").read_text())
        found = {}
        for key, a in tensors.items():
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                scaling = config["lora_alpha"] / config["r"]
                found[module] = scaling * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
        return found

    def weight(self, tensors: Mapping[str, Tensor], module: str) -> Tensor:
        """A module's weight as O x I."""
        names = [
            name for name in tensors if (name == f"{module}.weight" or f"transformer.{name}" == f"{module}.weight")
        ]
        return tensors[names[0]].T if self.kind == "gpt2" else tensors[names[0]]

    def _grams(self) -> Tensors:
        """(2 / N) X^T X of every decoder linear's input, one unpadded sample at a time through the whole model."""
        grams: dict[str, Any] = defaultdict(float)

        def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0][0].double()
                grams[name] = grams[name] + x.T @ x * 2 / len(LENGTHS)

            return hook

        linears = {name: m for name, m in self.model.named_modules() if _is_linear(m) and name != "lm_head"}
        handles = [module.register_forward_pre_hook(add(name)) for name, module in linears.items()]
        with torch.no_grad():
            for sample in self.tokens:
                self.model(input_ids=torch.tensor([sample]))
        for handle in handles:
            handle.remove()
        return dict(grams)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach().T if isinstance(module, transformers.pytorch_utils.Conv1D) else module.weight.detach()


def tensors_of(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def published(delta: Tensor, gram: Tensor, strength: float, rows_alone: bool = False) -> tuple[Tensor, Tensor]:
    """The delta written and the entries kept, in fp64: sort all entries of a block, then the loop over sub-blocks.

    `rows_alone` gives each row the block's budget over the rows, and never takes the 15 % costliest columns.
    """
    rows, columns = delta.shape
    diagonal = gram.diagonal()
    damped = gram + torch.diag(torch.where(diagonal == 0, 1.0, 0.0))
    damped += PERCDAMP * damped.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    delta, new = delta.double(), torch.zeros_like(delta, dtype=torch.float64)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        price = 1 / u.diagonal()[start:stop] ** 2
        budget = price.mean() * strength / 2 * rows / 4096
        loss = (delta - new)[:, start:stop] ** 2 * price
        if rows_alone:
            order = torch.argsort(price, stable=True)[: stop - start - int(0.15 * (stop - start))]
            for row in range(rows if strength else 0):
                taken = order[torch.cumsum(loss[row, order], 0) <= budget / rows]
                mask[row, start + taken] = True
        else:
            entries = torch.argsort(price.repeat_interleave(rows), stable=True)  # column by column
            entries = entries[: len(entries) - int(0.15 * len(entries))]
            taken = entries[torch.cumsum(loss.T.flatten()[entries], 0) <= budget]
            mask[taken % rows, start + taken // rows] = bool(strength)
        for i in range(start, stop, SUB_BLOCK):
            j = min(i + SUB_BLOCK, stop)
            errors = torch.where(mask[:, i:j], new[:, i:j] - delta[:, i:j], 0.0) / u.diagonal()[i:j]
            new[:, i:j] = torch.where(mask[:, i:j], delta[:, i:j], new[:, i:j])
            new[:, j:] -= errors @ u[i:j, j:]
    return new, mask


def assert_delta(got: Tensor, expected: Tensor, rounding: float, name: str) -> None:
    """Equal deltas up to TOLERANCE, and up to the rounding of fp32 weights they were taken from."""
    assert (got - expected).norm() <= TOLERANCE * expected.norm() + rounding, name


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Kind -> its case, each built once."""
    built: dict[str, Case] = {}

    def get(kind: str) -> Case:
        if kind not in built:
            built[kind] = Case(tmp_path_factory.mktemp(kind), kind)
        return built[kind]

    return get


@pytest.fixture
def llama(case: Any, tmp_path: Path) -> Case:
    """The Llama case, writing to a folder of its own."""
    shared: Case = case("llama")
    own = object.__new__(Case)
    own.__dict__ |= shared.__dict__
    own.root = tmp_path
    (tmp_path / "aligned").symlink_to(shared.root / "aligned")
    (tmp_path / "finetuned").symlink_to(shared.root / "finetuned")
    return own


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each calibration run."""
    runs: list[int] = []
    original = factors.calibrate

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(factors, "calibrate", counted)
    return runs


# ---- results


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", MODELS)
def test_full_checkpoint(case: Any, kind: str, strength: str) -> None:
    it: Case = case(kind)
    rest = "finetuned" if strength == "small" else "aligned"
    result, got = it.run(f"full-{strength}", finetuned=it.root / "finetuned", strength=STRENGTHS[strength], rest=rest)
    treated = set()
    for module, gram in it.grams.items():
        aligned, tuned = it.weight(it.aligned, module), it.weight(it.finetuned, module)
        expected, mask = published((tuned - aligned).double(), gram, STRENGTHS[strength])
        weight = it.weight(got, module)
        assert torch.equal(weight == tuned, mask), f"{module}: selections differ"
        rounding = 2.0**-24 * weight.norm().item()
        assert_delta(weight.double() - aligned.double(), expected, rounding, module)
        treated.add(next(n for n in got if it.weight(got, module).data_ptr() == got[n].data_ptr()))
    source = it.finetuned if rest == "finetuned" else it.aligned
    others = got.keys() - treated
    assert any("norm" in name or "ln_" in name for name in others)
    assert any(name.endswith(".bias") for name in others) == (kind in ("qwen2", "gpt2"))
    for name in others:
        assert torch.equal(got[name], source[name]), name
    assert result.manifest is not None
    assert {m.decision for m in result.manifest.modules} == {"selected"}
    assert len(result.manifest.modules) == len(it.grams)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", MODELS)
def test_adapter(case: Any, kind: str, strength: str) -> None:
    """An adapter in, one out: what PEFT makes of it is the published delta of W + scaling B A."""
    it: Case = case(kind)
    result, got = it.run(f"lora-{strength}", strength=STRENGTHS[strength])
    deltas = it.deltas(it.adapter, load_file(it.adapter / "adapter_model.safetensors"))
    out = it.deltas(it.root / f"lora-{strength}", got)
    assert deltas.keys() == out.keys() == it.grams.keys()
    merged = it.loaded(it.root / f"lora-{strength}")
    for module, gram in it.grams.items():
        expected, mask = published(deltas[module], gram, STRENGTHS[strength])
        assert_delta(out[module], expected, 0.0, module)
        rounding = 2.0**-23 * merged[module].norm().item()
        assert_delta(merged[module].double() - it.weight(it.aligned, module).double(), expected, rounding, module)
        assert result.manifest is not None
        [entry] = [entry for entry in result.manifest.modules if entry.name.endswith(module)]
        assert entry.selected_fraction == mask.double().mean().item()
    fractions = [entry.selected_fraction or 0.0 for entry in result.manifest.modules]
    assert min(fractions) > {"small": 0, "medium": 0.05, "huge": 0.84}[strength]
    assert max(fractions) < {"small": 0.5, "medium": 0.84, "huge": 0.86}[strength]


def test_adapter_equals_its_merged_checkpoint(llama: Case) -> None:
    """LoRA space against the full-checkpoint path on a checkpoint that holds W + scaling B A exactly."""
    deltas = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    tensors = load_file(llama.adapter / "adapter_model.safetensors")
    tensors = {name: (t * 256).round() / 256 for name, t in tensors.items()}
    adapter = llama.root / "exact"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text((llama.adapter / "adapter_config.json").read_text())
    save_file(tensors, adapter / "adapter_model.safetensors")
    aligned = {name: (t * 2**16).round() / 2**16 for name, t in llama.aligned.items()}
    (llama.root / "aligned").unlink()
    llama.write("aligned", aligned)
    deltas = llama.deltas(adapter, tensors)
    merged = aligned | {f"{m}.weight": (aligned[f"{m}.weight"].double() + d).float() for m, d in deltas.items()}
    assert all(
        torch.equal(merged[f"{m}.weight"].double() - aligned[f"{m}.weight"].double(), d) for m, d in deltas.items()
    )
    llama.write("merged", merged)
    for strength in STRENGTHS.values():
        _, full = llama.run(f"full-{strength}", finetuned=llama.root / "merged", strength=strength)
        _, lora = llama.run(f"lora-{strength}", adapter=adapter, strength=strength)
        _, whole = llama.run(f"whole-{strength}", adapter=adapter, strength=strength, output_format="checkpoint")
        for module, delta in llama.deltas(llama.root / f"lora-{strength}", lora).items():
            name = f"{module}.weight"
            rounding = 2.0**-24 * full[name].norm().item()
            change = full[name].double() - aligned[name].double()
            assert_delta(delta, change, rounding, module)
            assert_delta(whole[name].double() - aligned[name].double(), change, rounding, module)


def test_rank_truncates(llama: Case) -> None:
    _, exact = llama.run("exact", strength=2.0)
    result, got = llama.run("short", strength=2.0, rank=2)
    full = llama.deltas(llama.root / "exact", exact)
    assert result.manifest is not None
    losses = []
    for module, delta in llama.deltas(llama.root / "short", got).items():
        [entry] = [entry for entry in result.manifest.modules if entry.name == module]
        u, s, v = torch.linalg.svd(full[module])
        best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
        assert entry.rank == 2
        assert got[f"base_model.model.{module}.lora_A.weight"].shape[0] == 2
        assert (delta - best).norm() <= TOLERANCE * best.norm()
        assert entry.lost_fraction == pytest.approx((s[2:].norm() / s.norm()).item(), abs=1e-6)
        losses.append(entry.lost_fraction)
    assert max(losses) > 0.01
    llama.loaded(llama.root / "short")


@pytest.mark.parametrize("strength", [0.5, 2.0, 1e9])
def test_row_selection(llama: Case, strength: float) -> None:
    options = {"strength": strength, "selection": "row"}
    _, full = llama.run("full", finetuned=llama.root / "finetuned", **options)
    _, lora = llama.run("lora", output_format="checkpoint", **options)
    deltas = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    for module, gram in llama.grams.items():
        name = f"{module}.weight"
        aligned, tuned = llama.aligned[name], llama.finetuned[name]
        rounding = 2.0**-24 * aligned.norm().item()
        expected, mask = published((tuned - aligned).double(), gram, strength, rows_alone=True)
        assert torch.equal(full[name] == tuned, mask), f"{module}: selections differ"
        assert_delta(full[name].double() - aligned.double(), expected, rounding, module)
        expected, _ = published(deltas[module], gram, strength, rows_alone=True)
        assert_delta(lora[name].double() - aligned.double(), expected, rounding, module)


def test_row_selection_of_an_adapter_has_no_low_rank(llama: Case) -> None:
    with pytest.raises(RequestError, match="output_format=checkpoint"):
        llama.run("out", selection="row")


@pytest.mark.parametrize("compensate", [True, False])
def test_huge_strength_takes_85_percent_of_each_block(llama: Case, compensate: bool) -> None:
    options = {"finetuned": llama.root / "finetuned", "strength": 1e12, "compensate": compensate}
    _, got = llama.run("out", **options)
    for module in llama.grams:
        name = f"{module}.weight"
        kept = got[name] == llama.finetuned[name]
        for block in kept.split(BLOCK, 1):
            assert int(block.sum()) == block.numel() - int(0.15 * block.numel())
        if not compensate:
            assert torch.equal(got[name][~kept], llama.aligned[name][~kept])
        else:
            assert not torch.equal(got[name][~kept], llama.aligned[name][~kept])


@pytest.mark.parametrize(
    "options", [{}, {"selection": "row"}, {"adapter": True}, {"adapter": True, "selection": "row"}]
)
def test_strength_zero_is_the_aligned_model(llama: Case, options: dict[str, Any]) -> None:
    """Byte for byte: bf16, sharded, negative zeros included."""
    half = {name: t.bfloat16() for name, t in llama.aligned.items()}
    for tensor in half.values():
        tensor.view(-1)[::7] = -0.0
    (llama.root / "aligned").unlink()
    llama.write("aligned", half, shards=3)
    llama.write("tuned", {name: t.bfloat16() for name, t in llama.finetuned.items()}, shards=2)
    inputs = {"output_format": "checkpoint"} if options.pop("adapter", False) else {"finetuned": llama.root / "tuned"}
    _, got = llama.run("out", strength=0.0, dtype=None, **inputs, **options)
    assert got.keys() == half.keys()
    for name, tensor in half.items():
        assert torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name
    index = [json.loads((llama.root / f / "model.safetensors.index.json").read_text()) for f in ("out", "aligned")]
    assert index[0]["weight_map"] == index[1]["weight_map"]


def test_strength_zero_of_an_adapter_is_no_delta(llama: Case) -> None:
    _, got = llama.run("out", strength=0.0)
    assert all(not delta.any() for delta in llama.deltas(llama.root / "out", got).values())


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
def test_compensation_lowers_the_output_error(tmp_path: Path, model: str) -> None:
    """|X (W_new - W)|_F on the calibration inputs, from the published Hessians: error^2 = tr(D H D^T)."""
    root = GOLDENS / model
    tokens = json.loads((root / "expected/safedelta.json").read_text())["tokens"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
    hessians = load_file(root / "expected/safedelta-hessians.safetensors")
    aligned = tensors_of(root / "aligned")

    def errors(compensate: bool, strength: float) -> tuple[Result, dict[str, float]]:
        out = tmp_path / f"{compensate}-{strength}"
        result = safedelta(
            aligned=root / "aligned", finetuned=root / "finetuned", calibration=data, samples=len(tokens), output=out,
            strength=strength, compensate=compensate, dtype="float32", block_size=64, quiet=True,
        )  # fmt: skip
        found = {}
        for key, gram in hessians.items():
            module = key.removesuffix(".weight")
            delta = (
                load_file(out / "model.safetensors")[f"{module}.weight"].double() - aligned[f"{module}.weight"].double()
            )
            found[module] = torch.einsum("oi,ij,oj->", delta, gram.double(), delta).item()
        return result, found

    for strength in (0.5, 2.0):
        result, compensated = errors(True, strength)
        _, plain = errors(False, strength)
        assert result.manifest is not None
        selected = [entry.name for entry in result.manifest.modules if entry.selected_fraction]
        assert len(selected) == len(result.manifest.modules) == len(compensated)
        assert all(compensated[name] < plain[name] for name in selected)


# ---- what is no decoder linear


def test_rest_of_an_adapter(llama: Case) -> None:
    """modules_to_save, and a pair on the output head, follow --rest."""
    targets = ["q_proj", "down_proj", "lm_head"]
    adapter = llama.make_adapter("with-rest", target_modules=targets, modules_to_save=["embed_tokens"])
    source = load_file(adapter / "adapter_model.safetensors")
    saved = [key for key in source if "embed_tokens" in key]
    assert saved
    result, got = llama.run("aligned-rest", adapter=adapter)
    assert not [key for key in got if "embed_tokens" in key]
    assert not llama.deltas(llama.root / "aligned-rest", got)["lm_head"].any()
    assert json.loads((llama.root / "aligned-rest/adapter_config.json").read_text())["modules_to_save"] is None
    assert result.manifest is not None
    assert {f.subject for f in result.manifest.fallbacks} == {*saved, "lm_head"}
    assert not result.reverted
    llama.loaded(llama.root / "aligned-rest")

    result, got = llama.run("finetuned-rest", adapter=adapter, rest="finetuned")
    assert all(torch.equal(got[key], source[key]) for key in saved)
    head = llama.deltas(adapter, source)["lm_head"]
    assert_delta(llama.deltas(llama.root / "finetuned-rest", got)["lm_head"], head, 0.0, "lm_head")
    llama.loaded(llama.root / "finetuned-rest")

    _, got = llama.run("aligned-whole", adapter=adapter, output_format="checkpoint")
    assert torch.equal(got["lm_head.weight"], llama.aligned["lm_head.weight"])
    assert torch.equal(got["model.embed_tokens.weight"], llama.aligned["model.embed_tokens.weight"])
    with pytest.raises(RequestError, match="modules_to_save"):
        llama.run("refused", adapter=adapter, output_format="checkpoint", rest="finetuned")


def test_rest_of_an_adapter_in_a_checkpoint(llama: Case) -> None:
    adapter = llama.make_adapter("with-head", target_modules=["q_proj", "lm_head"])
    _, got = llama.run("out", adapter=adapter, output_format="checkpoint", rest="finetuned")
    head = llama.deltas(adapter, load_file(adapter / "adapter_model.safetensors"))["lm_head"]
    expected = llama.aligned["lm_head.weight"].double() + head
    assert (got["lm_head.weight"].double() - expected).abs().max() <= 2.0**-23 * expected.abs().max()


# ---- many jobs, one calibration


def test_a_batch_calibrates_once(llama: Case, calibrations: list[int]) -> None:
    """Strengths, selections and adapters share the run, and each output has the bytes of a run of its own."""
    other = llama.make_adapter("other", seed=5, target_modules=["q_proj", "up_proj"])
    shared = {"aligned", "calibration", "samples", "percdamp", "block_size", "sub_block", "dtype"}
    variants: list[dict[str, Any]] = [
        {"strength": 0.5},
        {"strength": 2.0},
        {"adapter": str(other), "strength": 2.0},
        {"output_format": "checkpoint", "selection": "row"},
        {"finetuned": str(llama.root / "finetuned"), "adapter": None},
        {"strength": 2.0, "compensate": False, "rank": 5},
    ]
    options = llama.options("unused")
    jobs = [
        {"method": "safedelta", "output": str(llama.root / f"batch-{i}"), "adapter": str(llama.adapter)} | variant
        for i, variant in enumerate(variants)
    ]
    file = llama.root / "jobs.yaml"
    defaults = {key: str(v) if isinstance(v, Path) else v for key, v in options.items() if key in shared}
    file.write_text(json.dumps({"defaults": defaults, "jobs": jobs}))
    batch(file, quiet=True)
    assert len(calibrations) == 1
    for i, variant in enumerate(variants):
        llama.run(f"single-{i}", **{key: value for key, value in variant.items() if value is not None})
        assert weights_of(llama.root / f"batch-{i}") == weights_of(llama.root / f"single-{i}"), variant
    assert len(calibrations) == 1 + len(variants)


def weights_of(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    assert files
    return files


def test_memory_and_spilling_change_no_byte(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that just suffices: hidden states go to a file, and what is in flight stays below it."""
    tuned = llama.root / "finetuned"
    result, _ = llama.run("roomy", finetuned=tuned, strength=2.0, memory="1GiB")
    with pytest.raises(RequestError, match="at least") as refused:
        llama.run("refused", finetuned=tuned, strength=2.0, memory="64KiB")
    need = max(int(o.expected.split()[2]) for o in refused.value.offences)
    budgets = []
    original = factors.calibrate

    def watched(*args: Any, **kwargs: Any) -> Any:
        budgets.append(kwargs["budget_bytes"])
        return original(*args, **kwargs)

    monkeypatch.setattr(factors, "calibrate", watched)
    result, _ = llama.run("tight", finetuned=tuned, strength=2.0, memory=need)
    assert budgets[0] < 1 << 14
    assert weights_of(llama.root / "tight") == weights_of(llama.root / "roomy")
    assert result.manifest is not None
    assert (result.manifest.run.peak_buffer_bytes or 0) <= need
    assert not (llama.root / "refused.partial").exists()


# ---- 70B


def sparse_checkpoint(folder: Path, config: dict[str, Any], dtype_bytes: int = 2) -> Path:
    """A checkpoint of the config's shapes whose data is a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner], "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
    }  # fmt: skip
    tensors = {"model.embed_tokens": [config["vocab_size"], hidden], "model.norm": [hidden]}
    tensors["lm_head"] = tensors["model.embed_tokens"]
    tensors |= {f"model.layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in shapes.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = dtype_bytes * torch.Size(shape).numel()
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


def test_70b_fits_20_gb_on_the_device(tmp_path: Path, llama: Case) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 1, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 8192,
    }  # fmt: skip
    aligned = sparse_checkpoint(tmp_path / "aligned70", config)
    tuned = sparse_checkpoint(tmp_path / "tuned70", config)
    with (tuned / "model.safetensors").open("r+b") as file:  # so that the first weight differs
        file.seek(8 + int.from_bytes(file.read(8), "little") + 2 * 128256 * 8192 * 2 + 8192 * 2)
        file.write(b"\1" * 64)
    from safeshard.streamer.calibrated import arithmetic_bytes, host_bytes
    from safeshard.streamer.steps import JobRun

    job = SafeDelta(
        aligned=aligned, finetuned=tuned, output=tmp_path / "out", calibration=str(llama.data), samples=len(LENGTHS)
    )
    with pytest.raises(RequestError, match="layer of the calibrated pass"):
        plan_jobs([job], RunOptions(memory="8GiB", device="cpu"))
    runs = [JobRun(plan) for plan in plan_jobs([job], RunOptions(memory="64GiB", device="cpu"))]
    gram, weight = 4 * 28672**2, 4 * 8192 * 28672
    assert 3 * gram <= arithmetic_bytes(runs) <= 20e9
    assert host_bytes(runs, torch.device("cpu")) == arithmetic_bytes(runs)
    assert host_bytes(runs, torch.device("cuda")) <= 8 * weight  # no Grams, no factors


# ---- resume


KILLED = """
import os, signal, sys
import torch
from safeshard.streamer import api, steps, writer

torch.set_num_threads(1)
writer.COMMIT_SECONDS = 0.0
decide, done = steps.JobRun.decide, []

def dying(self, module, entry):
    decide(self, module, entry)
    done.append(module)
    if len(done) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

steps.JobRun.decide = dying
api.batch(sys.argv[1], quiet=True)
"""


def test_resume_after_sigkill(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is not computed again, and the bytes are those of one run."""
    _, _ = llama.run("whole", finetuned=llama.root / "finetuned", strength=2.0)
    options = llama.options("out", finetuned=llama.root / "finetuned", strength=2.0)
    del options["quiet"]
    job = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    file = llama.root / "jobs.yaml"
    file.write_text(json.dumps({"jobs": [{"method": "safedelta"} | job]}))
    command = [sys.executable, "-c", KILLED, str(file), "9"]
    assert subprocess.run(command, env=os.environ, check=False, timeout=120).returncode == -signal.SIGKILL
    assert (llama.root / "out.partial").is_dir()
    edited = []
    original = SafeDelta.edit

    def edit(self: SafeDelta, module: Any) -> Any:
        edited.append(module.name)
        return original(self, module)

    monkeypatch.setattr(SafeDelta, "edit", edit)
    batch(file, quiet=True)
    assert 1 <= len(edited) <= len(llama.grams) - 8
    assert weights_of(llama.root / "out") == weights_of(llama.root / "whole")


# ---- what has no factor, and bad input


@pytest.fixture
def no_factor(monkeypatch: pytest.MonkeyPatch) -> str:
    """Grams of the MLP's width have no factor."""
    original = factors.safety_factor

    def refuse(gram: Tensor, percdamp: float) -> Any:
        if len(gram) == COMMON["intermediate_size"]:
            raise NotPositiveDefiniteError("not positive definite with damping 0.01, 0.1, 1")
        return original(gram, percdamp)

    monkeypatch.setattr(factors, "safety_factor", refuse)
    return "down_proj"


def run_cli(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return (stop.value.code if isinstance(stop.value.code, int) else 0), out, err


def arguments(options: Mapping[str, Any]) -> Iterator[object]:
    for name, value in options.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield value


@pytest.mark.parametrize("whole", [True, False])
def test_what_has_no_factor_stays_aligned(
    llama: Case, no_factor: str, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    inputs: dict[str, Any] = {"finetuned": llama.root / "finetuned"} if whole else {"adapter": llama.adapter}
    options = llama.options("out", rest="finetuned", **inputs)
    status, out, err = run_cli(capsys, "safedelta", *arguments(options), "--json")
    assert status == 1
    reverted = [module for module in llama.grams if no_factor in module]
    assert all(module in err for module in reverted)
    assert "not positive definite" in err
    [outcome] = json.loads(out.splitlines()[-1])
    assert outcome["decisions"] == {"selected": len(llama.grams) - len(reverted), "reverted": len(reverted)}
    manifest = json.loads((llama.root / "out/manifest.json").read_text())
    assert {f["subject"] for f in manifest["fallbacks"]} == set(reverted)
    got = tensors_of(llama.root / "out")
    deltas = {} if whole else llama.deltas(llama.root / "out", got)
    for module in llama.grams:
        if whole:
            unchanged = torch.equal(got[f"{module}.weight"], llama.aligned[f"{module}.weight"])
        else:
            unchanged = not deltas[module].any()
        assert unchanged == (module in reverted)
    assert run_cli(capsys, "verify", llama.root / "out")[0] == 0


def test_degenerate_data_still_has_factors(llama: Case) -> None:
    """One token, over and over: Grams of rank one or a few, which damping mends."""
    data = llama.root / "one.jsonl"
    data.write_text('{"input_ids": [5]}\n' * 3)
    result, got = llama.run("out", calibration=data, samples=3)
    assert not result.reverted
    assert all(t.isfinite().all() for t in got.values())


def test_non_finite_gram_names_module_and_sample(llama: Case, capsys: pytest.CaptureFixture[str]) -> None:
    aligned = dict(llama.aligned)
    token = llama.tokens[6][0]
    aligned["model.embed_tokens.weight"] = aligned["model.embed_tokens.weight"].clone()
    aligned["model.embed_tokens.weight"][token] = 1e30  # whose square overflows fp32 in the norm
    (llama.root / "aligned").unlink()
    llama.write("aligned", aligned)
    aligned["model.embed_tokens.weight"][token] = torch.nan
    save_file(aligned, llama.root / "aligned/model.safetensors")
    status, _, err = run_cli(capsys, "safedelta", *arguments(llama.options("out")))
    assert status == 1
    assert "model.layers.0.self_attn.q_proj" in err
    first = next(i for i in sorted(range(len(LENGTHS)), key=LENGTHS.__getitem__) if token in llama.tokens[i])
    assert f"calibration sample {first}" in err


def test_refusals_of_data(llama: Case, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(**options: Any) -> str:
        status, _, err = run_cli(capsys, "safedelta", *arguments(llama.options("out", **options)))
        assert status == 2
        assert not (llama.root / "out.partial").exists()
        return err

    assert f"{len(LENGTHS)}" in refused(samples=100)
    assert "100 samples" in refused(samples=100)
    text = llama.root / "text.jsonl"
    text.write_text('{"instruction": "a", "output": "b"}\n')
    err = refused(calibration=text, samples=1)
    assert "tokenizer" in err
    assert str(llama.root / "aligned") in err
    assert "safeshard-" not in err
    long = llama.root / "long.jsonl"
    long.write_text(json.dumps({"input_ids": [1] * 80}))
    err = refused(calibration=long, samples=1)
    assert "max_position_embeddings" in err
    assert "--max-tokens" in err
    outside = llama.root / "outside.jsonl"
    outside.write_text(json.dumps({"input_ids": [97]}))
    assert "outside.jsonl:1" in refused(calibration=outside, samples=1)


def test_padded_vocabulary_is_named(llama: Case) -> None:
    tensors = dict(llama.finetuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(31, 32)])
    llama.write("padded", tensors)
    with pytest.raises(RequestError, match="vocabularies differ"):
        llama.run("out", finetuned=llama.root / "padded")
    config = json.loads(llama.config)
    (llama.root / "aligned").unlink()
    llama.write("aligned", llama.aligned)
    (llama.root / "aligned/config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    with pytest.raises(RequestError, match="belong together"):
        llama.run("out", finetuned=llama.root / "finetuned")


def test_mixture_of_experts_is_refused(tmp_path: Path, llama: Case) -> None:
    config = transformers.AutoConfig.for_model("mixtral", **COMMON | {"num_local_experts": 2, "num_experts_per_tok": 1})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    tensors = load_file(tmp_path / "moe/model.safetensors")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/config.json").write_text((tmp_path / "moe/config.json").read_text())
    save_file({n: t + 0.01 for n, t in tensors.items()}, tmp_path / "tuned/model.safetensors")
    with pytest.raises(RequestError, match="mixture of experts") as refused:
        llama.run("out", aligned=tmp_path / "moe", finetuned=tmp_path / "tuned")
    assert "mixtral" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "output_format": "checkpoint"}, "rank goes with an adapter output"),
        ({"finetuned": "x", "adapter": None, "rank": 4}, "go with adapter"),
        ({"finetuned": "x", "adapter": None, "output_format": "adapter"}, "go with adapter"),
        ({"strength": -1.0}, "strength"),
        ({"sub_block": 0}, "sub-block"),
        ({"factors": "x", "calibration": "y"}, "calibration"),
        ({"factors": "x", "percdamp": 0.1}, "percdamp"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        safedelta(**{"aligned": "a", "adapter": "b", "output": tmp_path / "out"} | options)


def test_dry_run_says_what_a_layer_takes(llama: Case, capsys: pytest.CaptureFixture[str]) -> None:
    options = llama.options("out", dry_run=True)
    del options["quiet"]
    status, out, _ = run_cli(capsys, "safedelta", *arguments(options))
    assert status == 0
    assert "modules 14 of 14 expected" in out
    assert "Gram matrices, factors and compensation" in out
    assert not [path for path in llama.root.iterdir() if path.name.startswith("out")]


def test_adapter_without_compensation(llama: Case) -> None:
    _, got = llama.run("out", strength=2.0, compensate=False)
    deltas = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    for module, delta in llama.deltas(llama.root / "out", got).items():
        _, mask = published(deltas[module], llama.grams[module], 2.0)
        first = mask[:, :BLOCK]  # later blocks select by what compensation left
        assert 0 < first.double().mean() < 1
        assert_delta(delta[:, :BLOCK], deltas[module][:, :BLOCK] * first, 0.0, module)
        reverted = (delta - deltas[module]).abs() > 1e-6
        assert torch.equal(delta[reverted], torch.zeros_like(delta[reverted])), module


@pytest.mark.parametrize("whole", [True, False])
def test_a_value_that_is_not_finite_is_named(llama: Case, whole: bool) -> None:
    """Also where it would not have been selected."""
    folder = llama.root / "broken"
    if whole:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors = {n: t.clone() for n, t in llama.finetuned.items()}
        llama.write("broken", tensors)
    else:
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        shutil.copytree(llama.adapter, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name][1, 2] = torch.nan
    save_file(tensors, folder / ("model.safetensors" if whole else "adapter_model.safetensors"))
    with pytest.raises(RunError, match=rf"{name} holds NaN"):
        llama.run("out", strength=0.1, **{"finetuned" if whole else "adapter": folder})
