"""A device that runs out of memory: the jobs of a module are served in two halves, once, and the manifest says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.manifests.errors import RunError
from safeshard.streamer import batch
from safeshard.streamer.run.flow import compute


def jobs_file(world: Any, outputs: Path) -> Path:
    paths = {role: str(path) for role, path in world.items()}
    entries = [{"method": "safemerge", "threshold": t, "output": str(outputs / str(t))} for t in (0.1, 0.5, 0.9)]
    file = outputs.with_suffix(".yaml")
    file.write_text(json.dumps({"defaults": paths, "jobs": entries}))
    return file


def limit_tasks(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let the device hold the gates of `most` jobs."""
    gates = compute._gates

    def limited(tasks: Any, inputs: Any) -> Any:
        if len(tasks) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return gates(tasks, inputs)

    monkeypatch.setattr(compute, "_gates", limited)


def test_jobs_are_served_in_halves(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio = world.trio()
    expected = batch(jobs_file(trio, tmp_path / "whole"), quiet=True)
    limit_tasks(monkeypatch, 2)
    halves = batch(jobs_file(trio, tmp_path / "halves"), quiet=True)
    for one, two in zip(expected, halves, strict=True):
        assert one.manifest is not None
        assert two.manifest is not None
        assert one.manifest.tensors == two.manifest.tensors
        assert one.manifest.fallbacks == ()
        subjects = {f.subject for f in two.manifest.fallbacks}
        assert subjects == {m.name for m in two.manifest.modules}
        assert {f.why for f in two.manifest.fallbacks} == {"CUDA out of memory. Tried to allocate 2.00 GiB."}


def test_halves_that_do_not_fit_end_the_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio = world.trio()
    with monkeypatch.context() as patch:
        limit_tasks(patch, 0)
        with pytest.raises(RunError, match="the device is out of memory"):
            batch(jobs_file(trio, tmp_path / "out"), quiet=True)
    assert not [p for p in (tmp_path / "out").glob("*") if not p.name.endswith(".partial")]
    assert all(r.manifest for r in batch(jobs_file(trio, tmp_path / "out"), quiet=True))
