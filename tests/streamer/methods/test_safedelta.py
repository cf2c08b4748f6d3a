"""Safe Delta end to end, against a plain computation: the published sort of all entries, its loop of small steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.streamer import safedelta
from safeshard.streamer.run.result import Result

GOLDENS = Path(__file__).parents[2] / "goldens"
KINDS = ("llama", "qwen2", "phi3", "gpt2")
STRENGTHS = {"small": 0.5, "medium": 2.0, "huge": 1e9}
TOLERANCE = 1e-5  # of the change's norm, as for the goldens


def assert_delta(got: Tensor, expected: Tensor, rounding: float, name: str) -> None:
    """Equal deltas up to TOLERANCE, and up to the rounding of fp32 weights they were taken from."""
    assert (got - expected).norm() <= TOLERANCE * expected.norm() + rounding, name


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_checkpoint(case: Any, kind: str, strength: str) -> None:
    it = case(kind)
    rest = "finetuned" if strength == "small" else "aligned"
    result, got = it.run(f"full-{strength}", finetuned=it.root / "finetuned", strength=STRENGTHS[strength], rest=rest)
    treated = set()
    for module, gram in it.grams.items():
        aligned, tuned = it.weight(it.aligned, module), it.weight(it.finetuned, module)
        expected, mask = it.published((tuned - aligned).double(), gram, STRENGTHS[strength])
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
@pytest.mark.parametrize("kind", KINDS)
def test_adapter(case: Any, kind: str, strength: str) -> None:
    """An adapter in, one out: what PEFT makes of it is the published delta of W + scaling B A."""
    it = case(kind)
    result, got = it.run(f"lora-{strength}", strength=STRENGTHS[strength])
    deltas = it.deltas(it.adapter, load_file(it.adapter / "adapter_model.safetensors"))
    out = it.deltas(it.root / f"lora-{strength}", got)
    assert deltas.keys() == out.keys() == it.grams.keys()
    merged = it.loaded(it.root / f"lora-{strength}")
    for module, gram in it.grams.items():
        expected, mask = it.published(deltas[module], gram, STRENGTHS[strength])
        assert_delta(out[module], expected, 0.0, module)
        rounding = 2.0**-23 * merged[module].norm().item()
        assert_delta(merged[module].double() - it.weight(it.aligned, module).double(), expected, rounding, module)
        assert result.manifest is not None
        [entry] = [entry for entry in result.manifest.modules if entry.name.endswith(module)]
        assert entry.selected_fraction == mask.double().mean().item()
    fractions = [entry.selected_fraction or 0.0 for entry in result.manifest.modules]
    assert min(fractions) > {"small": 0, "medium": 0.05, "huge": 0.84}[strength]
    assert max(fractions) < {"small": 0.5, "medium": 0.84, "huge": 0.86}[strength]


def test_adapter_equals_its_merged_checkpoint(llama: Any) -> None:
    """LoRA space against the full-checkpoint path on a checkpoint that holds W + scaling B A exactly."""
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


def test_rank_truncates(llama: Any) -> None:
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
def test_row_selection(llama: Any, strength: float) -> None:
    options = {"strength": strength, "selection": "row"}
    _, full = llama.run("full", finetuned=llama.root / "finetuned", **options)
    _, lora = llama.run("lora", output_format="checkpoint", **options)
    deltas = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    for module, gram in llama.grams.items():
        name = f"{module}.weight"
        aligned, tuned = llama.aligned[name], llama.finetuned[name]
        rounding = 2.0**-24 * aligned.norm().item()
        expected, mask = llama.published((tuned - aligned).double(), gram, strength, rows_alone=True)
        assert torch.equal(full[name] == tuned, mask), f"{module}: selections differ"
        assert_delta(full[name].double() - aligned.double(), expected, rounding, module)
        expected, _ = llama.published(deltas[module], gram, strength, rows_alone=True)
        assert_delta(lora[name].double() - aligned.double(), expected, rounding, module)


def test_row_selection_of_an_adapter_has_no_low_rank(llama: Any) -> None:
    with pytest.raises(RequestError, match="--output-format checkpoint"):
        llama.run("out", selection="row")


@pytest.mark.parametrize("compensate", [True, False])
def test_huge_strength_takes_85_percent_of_each_block(llama: Any, compensate: bool) -> None:
    options = {"finetuned": llama.root / "finetuned", "strength": 1e12, "compensate": compensate}
    _, got = llama.run("out", **options)
    for module in llama.grams:
        name = f"{module}.weight"
        kept = got[name] == llama.finetuned[name]
        for block in kept.split(llama.block, 1):
            assert int(block.sum()) == block.numel() - int(0.15 * block.numel())
        if not compensate:
            assert torch.equal(got[name][~kept], llama.aligned[name][~kept])
        else:
            assert not torch.equal(got[name][~kept], llama.aligned[name][~kept])


@pytest.mark.parametrize(
    "options", [{}, {"selection": "row"}, {"adapter": True}, {"adapter": True, "selection": "row"}]
)
def test_strength_zero_is_the_aligned_model(llama: Any, options: dict[str, Any]) -> None:
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


def test_strength_zero_of_an_adapter_is_no_delta(llama: Any) -> None:
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
    aligned = load_file(root / "aligned/model.safetensors")

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


def test_adapter_without_compensation(llama: Any) -> None:
    _, got = llama.run("out", strength=2.0, compensate=False)
    deltas = llama.deltas(llama.adapter, load_file(llama.adapter / "adapter_model.safetensors"))
    for module, delta in llama.deltas(llama.root / "out", got).items():
        _, mask = llama.published(deltas[module], llama.grams[module], 2.0)
        first = mask[:, : llama.block]  # later blocks select by what compensation left
        assert 0 < first.double().mean() < 1
        assert_delta(delta[:, : llama.block], deltas[module][:, : llama.block] * first, 0.0, module)
        reverted = (delta - deltas[module]).abs() > 1e-6
        assert torch.equal(delta[reverted], torch.zeros_like(delta[reverted])), module


def test_rest_of_an_adapter(llama: Any) -> None:
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
    result, got = llama.run("finetuned-whole", adapter=adapter, output_format="checkpoint", rest="finetuned")
    assert torch.equal(got["model.embed_tokens.weight"], source["base_model.model.model.embed_tokens.weight"])
    assert not set(saved) & {f.subject for f in result.manifest.fallbacks}


def test_rest_of_an_adapter_in_a_checkpoint(llama: Any) -> None:
    adapter = llama.make_adapter("with-head", target_modules=["q_proj", "lm_head"])
    _, got = llama.run("out", adapter=adapter, output_format="checkpoint", rest="finetuned")
    head = llama.deltas(adapter, load_file(adapter / "adapter_model.safetensors"))["lm_head"]
    expected = llama.aligned["lm_head.weight"].double() + head
    assert (got["lm_head.weight"].double() - expected).abs().max() <= 2.0**-23 * expected.abs().max()
