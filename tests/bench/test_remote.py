"""Reading from afar reads every byte, side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeshard.bench import remote, rows
from safeshard.bench.pages import documents


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(remote, "DELAYS", (0.02,))
    monkeypatch.setattr("safeshard.streamer.sources.url.PIECE", 10_000)
    monkeypatch.setattr("safeshard.streamer.sources.http.PIECE", 10_000)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    remote.run(tmp_path / "models", "llama-tiny", 1, 1)
    found = rows.read("remote")
    size = sum(p.stat().st_size for p in tmp_path.glob("models/*/aligned/*.safetensors"))
    assert [int(row["bytes"]) for row in found] == [size, size]
    assert all(float(documents.CELLS["requests in flight"](row)) >= 8 for row in found)
    assert "requests in flight" in documents.markdown(found)
