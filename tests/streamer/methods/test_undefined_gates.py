"""Modules whose gate is undefined, because the alignment delta or the fine-tuned delta is zero, as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeshard.streamer import safelora, safemerge

SAME, UNTRAINED = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture
def paths(world: Any) -> dict[str, Path]:
    """Of one module aligned and unaligned agree, and one module's B was never trained."""
    made: dict[str, Path] = world.trio()
    unaligned = load_file(made["unaligned"] / "model.safetensors")
    aligned = load_file(made["aligned"] / "model.safetensors")
    unaligned[f"{SAME}.weight"] = aligned[f"{SAME}.weight"]
    save_file(unaligned, made["unaligned"] / "model.safetensors")
    pairs = load_file(made["adapter"] / "adapter_model.safetensors")
    pairs[f"base_model.model.{UNTRAINED}.lora_B.weight"].zero_()
    save_file(pairs, made["adapter"] / "adapter_model.safetensors")
    return made


def modules(output: Path) -> dict[str, dict[str, Any]]:
    return {m["name"]: m for m in json.loads((output / "manifest.json").read_text())["modules"]}


@pytest.mark.parametrize(("threshold", "decision"), [(0.35, "merged"), (-0.5, "kept")])
def test_safemerge_takes_the_cosine_for_zero(
    paths: dict[str, Path], world: Any, threshold: float, decision: str
) -> None:
    safemerge(**paths, output=world.root / "out", threshold=threshold, combine="exact", quiet=True)
    got = modules(world.root / "out")
    for name in (SAME, UNTRAINED):
        assert got[name]["decision"] == decision
        assert "cosine" not in got[name]
        assert "undefined" in got[name]["note"]
    if decision == "merged":
        written = load_file(world.root / "out/adapter_model.safetensors")
        safe = load_file(paths["safe_adapter"] / "adapter_model.safetensors")
        key = f"base_model.model.{UNTRAINED}.lora_"
        expected = 0.2 * 2 * safe[f"{key}B.weight"].double() @ safe[f"{key}A.weight"].double()
        merged = written[f"{key}B.weight"].double() @ written[f"{key}A.weight"].double()
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-7)


def test_safelora_keeps_them(paths: dict[str, Path], world: Any) -> None:
    del paths["safe_adapter"]
    safelora(**paths, output=world.root / "out", threshold=1.0, quiet=True)
    got = modules(world.root / "out")
    assert [got[name]["decision"] for name in (SAME, UNTRAINED)] == ["kept", "kept"]
    assert all("undefined" in got[name]["note"] for name in (SAME, UNTRAINED))
