"""What tests of sources share: a small checkpoint, the stand-in Hub, and short waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_checkpoint import reload_hub, write_checkpoint
from stand_in_hub import StandinHub

from safeshard.streamer.sources import remote


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards, one tensor each, with a config and a tokenizer."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.05)


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandinHub]:
    """The stand-in Hub without repositories, and empty caches."""
    hub = StandinHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)
    reload_hub(monkeypatch)
    yield hub
    hub.close()


@pytest.fixture
def hub(empty_hub: StandinHub, folder: Path) -> StandinHub:
    """The stand-in Hub with the checkpoint as org/name."""
    empty_hub.add("org/name", folder)
    return empty_hub
