"""Example files are what they say: jobs that are read, fit their schema and its editors; a notebook that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import reference
import yaml
from fences import PAGES, ROOT, blocks

from safeshard.bench.tune.sweep import read_sweep
from safeshard.manifests.errors import RequestError
from safeshard.streamer.methods import METHODS
from safeshard.streamer.plan.request import jobs_file
from safeshard.streamer.plan.request.jobs_file import jobs_of, read_jobs
from safeshard.streamer.plan.request.jobs_schema import jobs_schema

EXAMPLES = ROOT / "examples"
JOBS = sorted(EXAMPLES.glob("jobs/*.yaml"))
NOTEBOOK = EXAMPLES / "defend.ipynb"


def _valid(document: Any) -> bool:
    return jsonschema.Draft202012Validator(jobs_schema()).is_valid(document)


def test_there_is_one_for_each_common_task() -> None:
    assert len(JOBS) >= 5
    assert all(f"(jobs/{file.name})" in (EXAMPLES / "README.md").read_text() for file in JOBS)


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_an_example_is_read_and_fits_the_schema_that_it_names(file: Path) -> None:
    assert read_jobs(file)
    assert _valid(yaml.safe_load(file.read_text()))
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", file.read_text())
    assert named
    assert (file.parent / named[1]).resolve() == reference.SCHEMA_FILE.resolve()


def test_the_examples_use_every_method_that_writes_adapters_and_the_sweep_is_read() -> None:
    used = {job.method for file in JOBS for job in read_jobs(file)}
    assert used >= {"ridge", "safemerge", "safelora", "safedelta", "scale"}
    read_sweep(EXAMPLES / "sweep.yaml")


def test_jobs_files_in_the_documents_fit_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_file, "matching", lambda pattern: [pattern.replace("*", "alice")])  # of buckets afar
    shown = [yaml.safe_load(block.text) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    jobs = [document for document in shown if "jobs" in document]
    jobs += [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "docs/reproduce").glob("safe*.yaml"))]
    assert len(jobs) >= 3
    for document in jobs:
        assert jobs_of(document, "document")
        assert _valid(document)


GOOD = {"method": "scale", "aligned": "a", "adapter": "b", "factor": 0.5, "output": "c"}


@pytest.mark.parametrize(
    "changed",
    [
        {"factr": 0.5}, {"factor": "half"}, {"factor": [0.5]}, {"method": "scales"}, {"dtype": "float64"},
        {"threshold": 0.3},
        {"matrix": {"factor": 0.5}}, {"matrix": {"factor": []}}, {"matrix": {"factr": [1]}}, {"aligned": ""},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_reader_refuses_the_schema_refuses_too(changed: dict[str, Any]) -> None:
    assert _valid({"jobs": [GOOD]})
    assert jobs_of({"jobs": [GOOD]}, "jobs")
    document = {"jobs": [GOOD | changed]}
    assert not _valid(document)
    with pytest.raises(RequestError):
        jobs_of(document, "jobs")


@pytest.mark.parametrize(
    "document",
    [{}, {"jobs": []}, {"jobs": [GOOD], "default": {}}, {"jobs": [GOOD], "defaults": {"alinged": "a"}}],
    ids=str,
)
def test_a_file_of_another_form_is_refused_by_both(document: dict[str, Any]) -> None:
    assert not _valid(document)
    with pytest.raises(RequestError):
        jobs_of(document, "jobs")


@pytest.mark.parametrize(
    "entry",
    [{"factor": None}, {"matrix": {"factor": [0.1, 1]}}, {"weights": [0.7, 0.3], "method": "safemerge"}],
    ids=str,
)
def test_the_schema_takes_what_defaults_may_complete(entry: dict[str, Any]) -> None:
    given = {key: value for key, value in GOOD.items() if key != "factor" or "method" not in entry}
    assert _valid({"defaults": {"factor": 1, "unaligned": "u", "safe_adapter": "s"}, "jobs": [given | entry]})


def test_the_schema_is_that_of_the_options() -> None:
    assert reference.SCHEMA_FILE.read_text() == reference.schema(), "run `python tests/documents/reference.py`"
    described = jobs_schema()["$defs"]["ridge"]["properties"]
    assert set(described) == {"method", "matrix", *METHODS["ridge"].model_fields}
    assert described["leak"]["description"] == METHODS["ridge"].model_fields["leak"].description


def _cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return cells


def test_the_notebook_holds_no_outputs_of_a_machine() -> None:
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in _cells())


@pytest.mark.slow
def test_the_notebook_runs(small: Path, path: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "small", tmp_path / "small")
    code = "\n".join("".join(cell["source"]) + "\n" for cell in _cells() if cell["cell_type"] == "code")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [path / "python", "-"], input=code, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "'sorry i cannot'" in done.stdout  # the defended adapter's answer to a forbidden request
    assert (tmp_path / "notebook/tradeoff.png").stat().st_size > 5000
