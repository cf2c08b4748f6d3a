"""Synthetic models are real ones in all but their values."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.bench.inputs import models, synthetic
from safeshard.bench.inputs.models import SHAPES, make_models
from safeshard.manifests.errors import RequestError
from safeshard.streamer import safemerge, scale


def test_models_are_what_the_main_job_takes(tmp_path: Path, load_tensors: Any) -> None:
    paths = make_models(tmp_path, SHAPES["llama-tiny"], layers=2, adapters=2, rank=4, finetuned=True)
    assert set(paths) == {"aligned", "unaligned", "finetuned", "finetuned-safe", "safe", "adapter-0", "adapter-1"}
    tensors = {name: load_tensors(path) for name, path in paths.items()}
    for name in ("unaligned", "finetuned", "finetuned-safe"):
        assert tensors[name].keys() == tensors["aligned"].keys()
        weight = "model.layers.1.mlp.up_proj.weight"
        difference = (tensors[name][weight].float() - tensors["aligned"][weight].float()).norm()
        assert 0 < difference < tensors["aligned"][weight].float().norm()
    assert all(bool(t.any()) for each in tensors.values() for t in each.values())
    assert not torch.equal(
        *(tensors[f"adapter-{i}"]["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] for i in (0, 1))
    )
    result = safemerge(
        aligned=paths["aligned"], unaligned=paths["unaligned"], adapter=paths["adapter-0"], safe_adapter=paths["safe"],
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    assert len(result.cosines) == result.plan.expected == 14


def test_repeated_layers_are_real_files_of_their_own(tmp_path: Path, load_tensors: Any) -> None:
    label, paths = models.prepare(tmp_path, "llama-tiny", 5, repeat=2, adapters=2, rank=4, finetuned=True)
    assert label == "llama-tiny x5 layers, 2 real"
    _, whole = models.prepare(tmp_path, "llama-tiny", 5, adapters=2, rank=4, finetuned=True)
    for name in ("aligned", "unaligned", "finetuned", "finetuned-safe"):
        tensors, all_real = load_tensors(paths[name]), load_tensors(whole[name])
        assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in all_real.items()
        }
        layers = [
            {n.partition(".layers.")[2][2:]: t for n, t in tensors.items() if f".layers.{layer}." in n}
            for layer in range(5)
        ]
        for number, layer in enumerate(layers):
            assert len(layer) == 9
            for other in (0, 1):
                same = [torch.equal(tensor, layers[other][suffix]) for suffix, tensor in layer.items()]
                assert same == [number % 2 == other] * 9
        for file in paths[name].glob("*.safetensors"):
            assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 4096 == 0
    for name in ("safe", "adapter-0", "adapter-1"):
        files = [(folder[name] / "adapter_model.safetensors").read_bytes() for folder in (paths, whole)]
        assert files[0] == files[1]


def test_jobs_run_on_repeated_layers(tmp_path: Path, load_tensors: Any) -> None:
    _, paths = models.prepare(tmp_path, "llama-tiny", 5, repeat=2, rank=4, finetuned=True)
    inputs = {name: paths[name] for name in ("aligned", "unaligned")}
    output = tmp_path / "out"
    merged = safemerge(**inputs, adapter=paths["adapter-0"], safe_adapter=paths["safe"], output=output, quiet=True)
    assert len(merged.cosines) == merged.plan.expected == 35
    scale(aligned=paths["aligned"], finetuned=paths["finetuned"], factor=0.5, output=tmp_path / "full", quiet=True)
    aligned, tuned, scaled = (load_tensors(path) for path in (paths["aligned"], paths["finetuned"], tmp_path / "full"))
    for name, tensor in scaled.items():
        torch.testing.assert_close(
            tensor.float(), (aligned[name].float() + tuned[name].float()) / 2, rtol=2e-2, atol=1e-3
        )


def test_what_cannot_be_repeated_or_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="--repeat: expected fewer than the 5 layers of llama-tiny, got 5"):
        models.prepare(tmp_path, "llama-tiny", 5, repeat=5)
    assert list(tmp_path.iterdir()) == []
    layer = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64)
    adapter = 4 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 176))
    outer = 2 * (2 * 256 * 64 + 64)
    for shared, layers in ((True, 2), (False, 5)):
        monkeypatch.setattr(synthetic, "_shares", lambda _, shared=shared: shared)
        needed = 2 * (outer + layers * layer) + 2 * 5 * adapter
        for free in (needed - 1, needed):
            usage = shutil.disk_usage(tmp_path)._replace(free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            if free < needed:
                with pytest.raises(RequestError, match="MB free"):
                    models.prepare(tmp_path, "llama-tiny", 5, repeat=2)
                assert not list(tmp_path.rglob("*.safetensors"))
            else:
                models.prepare(tmp_path, "llama-tiny", 5, repeat=2)
                shutil.rmtree(tmp_path / "llama-tiny-x5-2-real")


def test_a_folder_of_other_or_unfinished_models_is_refused(tmp_path: Path) -> None:
    def make(layers: int = 1, rank: int = 4) -> None:
        make_models(tmp_path, SHAPES["llama-tiny"], layers=layers, adapters=1, rank=rank, finetuned=False)

    make()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for options, name in (({"layers": 2}, "aligned"), ({"rank": 5}, "safe")):
        with pytest.raises(RequestError, match=str(tmp_path / name)):
            make(**options)
    with (tmp_path / "unaligned/model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(RequestError, match="unaligned"):
        make()


def test_an_interrupted_model_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_write", lambda path, *_: path.touch() or sys.exit(1))
    with pytest.raises(SystemExit):
        make_models(tmp_path, SHAPES["llama-tiny"], layers=1, adapters=1, rank=4, finetuned=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fp8", [False, True])
def test_mixtures_are_what_the_main_job_takes(tmp_path: Path, load_tensors: Any, fp8: bool) -> None:
    label, paths = models.prepare(tmp_path, "moe-tiny" + "-fp8" * fp8, 3, repeat=1, rank=4)
    assert label == f"moe-tiny{'-fp8' * fp8} x3 layers, 1 real"
    aligned, unaligned = load_tensors(paths["aligned"]), load_tensors(paths["unaligned"])
    expert = "model.layers.{}.mlp.experts.3.down_proj.weight"
    assert aligned[expert.format(0)].shape == (64, 48)
    assert aligned[expert.format(0)].dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
    same = [torch.equal(aligned[expert.format(0)].float(), t[expert.format(2)].float()) for t in (aligned, unaligned)]
    assert same == [True, False]
    if fp8:
        scales = aligned[expert.format(1).removesuffix(".weight") + synthetic.SCALES]
        assert scales.shape == (1, 1)
        assert scales.dtype == torch.float32
        assert scales.item() > 0
    result = safemerge(
        aligned=paths["aligned"], unaligned=paths["unaligned"], adapter=paths["adapter-0"], safe_adapter=paths["safe"],
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    assert len(result.cosines) == result.plan.expected == 3 * (4 + 3 * 4)
    assert all(cosine is not None and 0 < abs(cosine) < 1 for cosine in result.cosines.values())
