"""The published implementations' results (tests/goldens): SafeMERGE and SafeLoRA end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safeshard.streamer import safedelta, safelora, safemerge, score

COSINE = 1e-6  # absolute, against float64
LINEAR = 1e-6  # relative, A and B of fp32 adapters
PROJECTED = 1e-5  # relative, B


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
def test_cosines_are_those_of_float64(golden: Any, model: str) -> None:
    root = golden(model)
    expected = json.loads((root / "expected/safemerge.json").read_text())["cosine_fp64"]
    [result] = score(aligned=root / "aligned", unaligned=root / "unaligned", adapter=root / "ft-adapter")
    assert result.cosines.keys() == expected.keys()
    for module, cosine in expected.items():
        assert result.cosines[module] == pytest.approx(cosine, abs=COSINE)


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
def test_safemerge_linear(golden: Any, load_tensors: Any, tmp_path: Path, model: str) -> None:
    root = golden(model)
    published = json.loads((root / "expected/safemerge.json").read_text())
    out = tmp_path / "out"
    result = safemerge(
        aligned=root / "aligned", unaligned=root / "unaligned", adapter=root / "ft-adapter",
        safe_adapter=root / "safe-adapter", output=out, threshold=published["threshold"], weights=published["weights"],
    )  # fmt: skip
    expected = load_tensors(root / "expected/safemerge-linear/weighted")
    got = load_tensors(out)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative(got[name], tensor) <= LINEAR, name
    config = json.loads((out / "adapter_config.json").read_text())
    theirs = json.loads((root / "expected/safemerge-linear/weighted/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (theirs["r"], theirs["lora_alpha"])
    assert result.manifest is not None
    merged = {m.name for m in result.manifest.modules if m.decision == "merged"}
    assert merged == {n for n, c in published["cosine_fp64"].items() if c < published["threshold"]}


@pytest.mark.parametrize("rule", ["threshold", "number"])
def test_safelora(golden: Any, load_tensors: Any, tmp_path: Path, rule: str) -> None:
    root = golden("llama")
    threshold = json.loads((root / "expected/safemerge.json").read_text())["threshold"]
    options: dict[str, Any] = {"threshold": threshold} if rule == "threshold" else {"num_layers": 3}
    out = tmp_path / "out"
    safelora(aligned=root / "aligned", unaligned=root / "unaligned", adapter=root / "ft-adapter", output=out, **options)
    expected = load_tensors(root / f"expected/safelora-{rule}")
    got = load_tensors(out)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if "lora_A" in name:
            assert torch.equal(got[name], tensor)
        else:
            assert relative(got[name], tensor) <= PROJECTED, name


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
def test_safedelta(golden: Any, load_tensors: Any, tmp_path: Path, model: str) -> None:
    root = golden(model)
    published = json.loads((root / "expected/safedelta.json").read_text())
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input_ids": tokens}) + "\n" for tokens in published["tokens"]))
    out = tmp_path / "out"
    safedelta(
        aligned=root / "aligned", finetuned=root / "finetuned", calibration=data, samples=len(published["tokens"]),
        strength=published["s"], block_size=published["blocksize"], sub_block=published["sub_block"],
        percdamp=published["percdamp"], dtype="float32", output=out,
    )  # fmt: skip
    expected = load_file(root / "expected/safedelta.safetensors")
    aligned, tuned = load_tensors(root / "aligned"), load_tensors(root / "finetuned")
    got = load_tensors(out)
    for name, tensor in got.items():
        if "_proj.weight" not in name:
            assert torch.equal(tensor, aligned[name].float()), name
            continue
        theirs, kept = expected[name].double(), tuned[name].double()
        assert torch.equal(tensor.double() == kept, theirs == kept), f"{name}: selections differ"
        change = (theirs - aligned[name].double()).norm()
        assert ((tensor.double() - theirs).norm() / change).item() <= 1e-5, name
