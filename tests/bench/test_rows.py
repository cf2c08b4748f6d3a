"""Figures in the documents come from rows, and rows are only ever appended."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeshard.bench import rows
from safeshard.bench.pages import documents


def test_documents_show_the_newest_rows() -> None:
    for document in documents.documents():
        text = document.read_text()
        assert "<!-- rows: " in text, document
        assert documents.refresh(document) == text, f"{document.name} is stale: run `safeshard bench report`"


def test_append_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    row = {"what": "x", "shape": "s", "median_s": "1", "min_s": "1", "max_s": "2", "bytes": "5", "GB_per_s": "3.00",
           "peak_rss_bytes": "7", "cache": "warm", "backend": ""}  # fmt: skip
    rows.append("t", row)
    rows.append("t", {**row, "median_s": "2"})
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].split(",") == list(rows.COLUMNS)
    assert (
        documents.markdown(rows.read("t"))
        .splitlines()[-1]
        .startswith("| x | s | warm | 2.00 s | 1.00 s to 2.00 s | 3.00 | 0.00 GB |")
    )
    assert "dtype" not in documents.markdown(rows.read("t"))
    assert documents.markdown(rows.read("none")) == "No rows yet.\n"
    with pytest.raises(ValueError, match="unknown columns"):
        rows.append("t", {"colour": "red"})
    (tmp_path / "old.csv").write_text("what,median_s\nx,1\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.append("old", row)
    assert (tmp_path / "old.csv").read_text() == "what,median_s\nx,1\n"


def test_tables_go_by_size_and_show_what_is_still_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "environment", dict)
    plain = {"median_s": "1", "min_s": "1", "max_s": "1", "cache": "warm"}
    job = {**plain, "what": "merge", "stages": "read=1.0", "share_of_ceiling": "0.5"}
    for layers, model, cache in ((80, "70b", "cold"), (22, "1b", "cold"), (22, "1b", "warm"), (2, "1b", "warm")):
        rows.append("pipeline", {**job, "shape": f"llama-{model} x{layers} layers", "layers": layers, "cache": cache})
    rows.append("pipeline", {**plain, "what": "plain read: merge", "shape": "llama-1b x22 layers", "layers": 22})
    rows.append("pipeline", {**plain, "what": min(rows.RETIRED), "shape": "llama-1b x22 layers"})

    def shown(name: str) -> list[list[str]]:
        return [line.strip("| ").split(" | ")[:3] for line in documents._shown(name).splitlines()[2:]]

    short = [
        ["merge", "llama-1b x22 layers", "warm"], ["merge", "llama-1b x22 layers", "cold"],
        ["merge", "llama-70b x80 layers", "cold"],
    ]  # fmt: skip
    assert shown("jobs") == short
    assert shown("pipeline") == [
        ["merge", "llama-1b x2 layers", "warm"], short[0], ["plain read: merge", *short[0][1:]], *short[1:],
    ]  # fmt: skip
    assert "spread" in documents._shown("pipeline")
    assert "spread" not in documents._shown("jobs")


def test_a_picture_is_shown_where_it_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    rows.RESULTS.mkdir()
    document = tmp_path / "README.md"
    document.write_text("<!-- picture: jobs -->\n![old](old.png)\n<!-- end -->\n")
    assert documents.refresh(document) == "<!-- picture: jobs -->\n<!-- end -->\n"
    (rows.RESULTS / "jobs.png").touch()
    assert documents.refresh(document) == "<!-- picture: jobs -->\n![jobs](results/jobs.png)\n<!-- end -->\n"
