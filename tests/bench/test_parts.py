"""The cost of parts: which commands are run, and what is added up."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from safeshard.bench import parts, rows
from safeshard.bench.machine.measure import Sample
from safeshard.streamer.plan.request.jobs_file import read_jobs


def test_all_parts_and_finish_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    asked: list[list[str]] = []
    jobs: list[int] = []

    def process(command: Sequence[str]) -> Sample:
        words = [word for word in command if word not in (*parts.SAFESHARD, "--quiet")]
        jobs.append(len(read_jobs(Path(words[1]))))  # which refuses what is no jobs file
        asked.append([word for word in words if not word.endswith(".yaml")])
        return Sample(2.0, 100, processor=1.5)

    def clean_run(outputs: Path, command: Sequence[str]) -> Sample:
        part = "--part" in command  # the last of so many is empty, and writes no manifest
        return Sample(1.0, processor=2.0) if part else Sample(5.0, 200, 0, 1000, {"processor": 6.0}, 6.0)

    monkeypatch.setattr(parts, "process", process)
    monkeypatch.setattr(parts, "clean_run", clean_run)
    parts.run(tmp_path, "llama-tiny", 2, None, 3, 1)
    each = [["batch", "--part", "1/3"], ["batch", "--part", "2/3"], ["batch", "--part", "3/3"], ["finish"]]
    assert asked == each * 4  # two batches, each once to warm up
    assert jobs == [8] * 8 + [1] * 8
    with (tmp_path / "results/parts.csv").open() as file:
        whole, empty, cut, *_ = csv.DictReader(file)
    assert (whole["what"], whole["stages"]) == ("safemerge, 8 adapters, one process", "processor=6.000")
    assert (empty["what"], empty["stages"]) == ("safemerge, 8 adapters, a part with nothing to do", "processor=2.000")
    assert (cut["what"], cut["stages"]) == ("safemerge, 8 adapters, 3 parts and finish", "processor=6.000")
    assert (cut["median_s"], cut["time_ratio"], cut["peak_rss_bytes"]) == ("8", "0.62", "100")
