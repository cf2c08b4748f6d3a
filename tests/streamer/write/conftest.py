"""What tests of writing share: the stand-in Hub and bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
from standins import bucket, empty_hub, short_waits

__all__ = ["bucket", "empty_hub", "short_waits"]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which outputs for places afar are put together."""
    monkeypatch.setenv("SAFESHARD_WORK", str(tmp_path / "work"))
    return tmp_path / "work"
