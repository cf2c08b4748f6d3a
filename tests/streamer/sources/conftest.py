"""What tests of sources share: a small checkpoint, the stand-ins, and short waits."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint
from stand_in_hub import StandinHub
from standins import bucket, empty_hub, short_waits

__all__ = ["bucket", "empty_hub", "short_waits"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards, one tensor each, with a config and a tokenizer."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def hub(empty_hub: StandinHub, folder: Path) -> StandinHub:
    """The stand-in Hub with the checkpoint as org/name."""
    empty_hub.add("org/name", folder)
    return empty_hub
