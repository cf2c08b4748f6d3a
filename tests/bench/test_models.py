"""Synthetic models are real ones in all but their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safeshard.bench.models import SHAPES, make_models
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
