"""The files of docs/reproduce are what the commands take."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeshard.bench.evaluation.suite import read_suite
from safeshard.streamer.plan.request.jobs_file import read_jobs

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("name", "jobs"), [("safedelta", 6), ("safemerge", 12)])
def test_jobs(name: str, jobs: int) -> None:
    found = read_jobs(DOCS / "reproduce" / f"{name}.yaml")
    assert len(found) == len({job.output for job in found}) == jobs


@pytest.mark.parametrize("name", ["samsum", "gsm8k"])
def test_suites(name: str) -> None:
    assert read_suite(DOCS / "reproduce" / f"{name}.yaml", {"": DOCS / "x.json"}).name == name


def test_the_page_names_every_file() -> None:
    text = (DOCS / "reproduce.md").read_text()
    assert all(f"reproduce/{file.name}" in text for file in (DOCS / "reproduce").iterdir())
