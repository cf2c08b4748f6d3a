"""Fused experts are read one at a time and once, in bounded memory; what was interrupted is made good."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import large_layer
import mixtures
import pytest
import quantised
import torch
from safetensors.torch import load_file

from safeshard.manifests.errors import RunError
from safeshard.streamer import safelora, verify
from safeshard.streamer.run.flow.assemble import Assembler
from safeshard.streamer.run.one_pass import Pass
from safeshard.streamer.sources.local import LocalSource

KINDS = ("qwen3_5_moe_text", "qwen3_vl_moe_text", "gpt_oss", "mxfp4")


@pytest.fixture(scope="module", params=KINDS)
def places(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Aligned, unaligned and fine-tuned: fused, transposed, in turns, and quantised so."""
    root = tmp_path_factory.mktemp(request.param)
    kind = "gpt_oss" if request.param == "mxfp4" else request.param
    sizes = {"hidden_size": 32, "intermediate_size": 32} if request.param == "mxfp4" else {}
    for seed, role in enumerate(("aligned", "unaligned", "finetuned"), 1):
        plain = mixtures.save(mixtures.build(kind, seed, **sizes), root / f"{role}-plain", kind == "qwen3_5_moe_text")
        if request.param == "mxfp4":
            quantised.as_gpt_oss(plain, root / role)
        else:
            plain.rename(root / role)
    return {role: root / role for role in ("aligned", "unaligned", "finetuned")} | {"threshold": 2.0, "quiet": True}


def test_no_read_is_larger_than_an_expert_and_each_byte_is_read_once(
    places: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, int, int]] = Counter()
    original, execute = LocalSource.readinto, Pass.execute

    def counted(self: LocalSource, name: str, offset: int, view: memoryview) -> None:
        reads[Path(self.spec).name, offset, len(view)] += 1
        original(self, name, offset, view)

    def executed(self: Pass, runs: Any) -> None:  # the pass alone: files are hashed before and after
        monkeypatch.setattr(LocalSource, "readinto", counted)
        execute(self, runs)
        monkeypatch.setattr(LocalSource, "readinto", original)

    monkeypatch.setattr(Pass, "execute", executed)
    safelora(**places, output=tmp_path / "out")
    tensors = load_file(places["unaligned"] / "model.safetensors")
    fused = [name for name, tensor in tensors.items() if "experts." in name and tensor.ndim > 2]
    linears = [n for n, t in tensors.items() if ".layers." in n and n.endswith(".weight") and t.ndim == 2]
    expert = max(tensors[name].nbytes // len(tensors[name]) for name in fused)
    mine = {key: count for key, count in reads.items() if key[0] == "unaligned"}  # of which nothing is copied
    assert max(size for _, _, size in mine) <= max(expert, *(tensors[name].nbytes for name in linears))
    assert set(mine.values()) == {1}
    routed = sum(tensors[name].nbytes for name in fused)
    treated = sum(
        tensors[n].nbytes for n in linears if "gate.weight" not in n and "router" not in n and "_gate." not in n
    )
    assert sum(size for _, _, size in mine) == routed + treated


def test_an_interrupted_run_ends_with_the_same_bytes(
    places: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safelora(**places, output=tmp_path / "whole")
    stores, original = [0], Assembler._store

    def failing(self: Assembler, *args: Any) -> None:
        stores[0] += 1
        if stores[0] == 7:
            raise RunError("interrupted")
        original(self, *args)

    monkeypatch.setattr(Assembler, "_store", failing)
    with pytest.raises(RunError, match="interrupted"):
        safelora(**places, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    safelora(**places, output=tmp_path / "out")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()
    entries = [mixtures.manifest(tmp_path / name)["modules"] for name in ("whole", "out")]
    assert entries[0] == entries[1]


def test_a_module_of_fused_experts_is_recomputed(places: dict[str, Any], tmp_path: Path) -> None:
    safelora(**places, output=tmp_path / "out")
    assert verify(tmp_path / "out", inputs=True, recompute=3) == []
    file = tmp_path / "out/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert verify(tmp_path / "out")


@pytest.mark.slow
def test_a_layer_of_235b_takes_less_than_2_gb(tmp_path: Path) -> None:
    """128 experts of 4096 x 1536, as Qwen3-235B has: 9.7 GB of weights, and a LoRA of rank 8 on all of them."""
    sizes = (128, 4096, 1536)
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        large_layer.write(tmp_path / role, seed, *sizes)
    large_layer.adapter(tmp_path / "adapter", *sizes, rank=8)
    words = ["safelora", "--threshold", "0.5", "--output", tmp_path / "out", "--memory", "1GiB"]
    for role in ("aligned", "unaligned", "adapter"):
        words += [f"--{role}", tmp_path / role]
    done = subprocess.run(
        [sys.executable, "-m", "safeshard", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "experts.*.down_proj 128 of 128, experts.*.gate_up_proj 128 of 128" in done.stdout
    run = mixtures.manifest(tmp_path / "out")["run"]
    assert run["peak_buffer_bytes"] <= 1 << 30
    assert run["peak_host_bytes"] < 2e9
    weights = 2 * 3 * 128 * 4096 * 1536 * 2
    assert weights < run["bytes_read"] < 1.3 * weights
    assert torch.isfinite(load_file(tmp_path / "out/adapter_model.safetensors").popitem()[1]).all()
