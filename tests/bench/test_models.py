"""Synthetic models are real ones in all but their values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.bench import models
from safeshard.bench.models import SHAPES, make_models
from safeshard.manifests.errors import RequestError
from safeshard.streamer import safemerge


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
    monkeypatch.setattr(models, "_write", lambda path, *_: path.touch() or sys.exit(1))
    with pytest.raises(SystemExit):
        make_models(tmp_path, SHAPES["llama-tiny"], layers=1, adapters=1, rank=4, finetuned=False)
    assert list(tmp_path.iterdir()) == []
