"""A checkpoint of two shards, one tensor each, and what reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safeshard.streamer.inputs.checkpoint import Checkpoint

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def write_checkpoint(folder: Path) -> Path:
    """Write it, with a config and a tokenizer."""
    folder.mkdir(parents=True)
    for i, shard in enumerate(SHARDS):
        save_file({f"model.layers.{i}.up.weight": torch.full((30, 50), i + 1.0)}, folder / shard)
    weight_map = {f"model.layers.{i}.up.weight": shard for i, shard in enumerate(SHARDS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read_weight(checkpoint: Checkpoint, layer: int) -> bytes:
    """The bytes of a layer's tensor."""
    ref = checkpoint.tensors[f"model.layers.{layer}.up.weight"]
    buffer = bytearray(ref.nbytes)
    checkpoint.source.readinto(ref.file, ref.offset, memoryview(buffer))
    return bytes(buffer)


def weight(layer: int) -> bytes:
    """What they are to be."""
    return torch.full((30, 50), layer + 1.0).numpy().tobytes()


def header_end(path: Path) -> int:
    """Where the data begins."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    """The text of an error, which is to be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def reload_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub read its environment again: it does so when first imported."""
    for module in [m for m in sys.modules if m.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)
