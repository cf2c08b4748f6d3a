"""A job whose output goes to the stand-in bucket: what it is compared with, and faults in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stand_in_bucket import Asked, StandinBucket, Trouble

OUT = "s3://models/out/x"


def files(bucket: StandinBucket, prefix: str = "out/x") -> dict[str, bytes]:
    return {name: bucket.get(f"{prefix}/{name}") for name in bucket.names(prefix)}


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(ours: dict[str, bytes], theirs: dict[str, bytes]) -> bool:
    """Whether two outputs are one, but for when and how fast they were written."""

    def content(output: dict[str, bytes]) -> dict[str, Any]:
        manifest = json.loads(output["manifest.json"])
        return output | {"manifest.json": {k: v for k, v in manifest.items() if k not in ("run", "blake3")}}

    return content(ours) == content(theirs)


@pytest.fixture
def full(world: Any) -> dict[str, Any]:
    """A job on checkpoints of a shard a layer, with copies in each."""
    return layered(world) | {"quiet": True, "memory": "64MiB"}


def layered(world: Any) -> dict[str, Path]:
    """An aligned, an unaligned and a fine-tuned checkpoint of three shards, one a layer."""
    tensors = world.llama(3, seed=1)
    folders = {}
    for seed, role in enumerate(("aligned", "unaligned", "finetuned")):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in tensors.items()}
        folders[role] = world.checkpoint(role, moved, 3)
        _by_layer(folders[role], moved)
    return folders


def _by_layer(folder: Path, tensors: dict[str, Any]) -> None:
    """Lay a checkpoint out as published ones are: a shard holds layers."""

    def shard(name: str) -> str:
        layer = int(name.split(".")[2]) if ".layers." in name else 2 * ("embed" not in name)
        return f"model-{layer + 1:05d}-of-00003.safetensors"

    for file in {shard(name) for name in tensors}:
        save_file({n: t for n, t in tensors.items() if shard(n) == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard(name) for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class _Once:
    count = 0


def fault(bucket: StandinBucket, match: str, trouble: Trouble, times: int = 1) -> _Once:
    """Let the first writes whose path matches go wrong."""
    once = _Once()

    def writing(asked: Asked) -> Trouble | None:
        if match in asked.path and once.count < times:
            once.count += 1
            return trouble
        return None

    bucket.writing = writing
    return once
