"""Figures in the documents come from rows, and rows are only ever appended."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeshard.bench import rows


def test_documents_show_the_newest_rows() -> None:
    for document in rows.documents():
        text = document.read_text()
        assert "<!-- rows: " in text, document
        assert rows.refresh(document) == text, f"{document.name} is stale: run `safeshard bench report`"


def test_append_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    row = {"what": "x", "shape": "s", "median_s": "1", "min_s": "1", "max_s": "2", "bytes": "5", "GB_per_s": "3.00",
           "peak_rss_bytes": "7", "cache": "warm", "backend": ""}  # fmt: skip
    rows.append("t", row)
    rows.append("t", {**row, "median_s": "2"})
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].split(",") == list(rows.COLUMNS)
    assert "| 2.00 s | 1.00-2.00 s | 3.00 |" in rows.markdown("t")
    with pytest.raises(ValueError, match="unknown columns"):
        rows.append("t", {"colour": "red"})
