"""The examples for clusters, which no cluster is here to run: their syntax, and that the commands are commands.

The parts that they start are tested in tests/streamer/run/test_parts.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from safeshard.streamer.cli.app import app
from safeshard.streamer.plan.parts import Part
from safeshard.streamer.plan.request.jobs_file import read_jobs

FOLDER = Path(__file__).parent.parent / "examples/cluster"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_scripts(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


def test_the_jobs_file_is_read() -> None:
    assert [job.output.name for job in read_jobs(FOLDER / "jobs.yaml")] == ["alice", "bob", "carol"]


def test_every_command_has_the_options_that_are_given() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = []
    for file in FOLDER.iterdir():
        for words in re.findall(r"safeshard[, ]+((?:batch|finish)\b[^\n\]]*)", file.read_text().replace("\\\n", " ")):
            name, *rest = re.split(r"[\s,'\"\])]+", words)
            options = {name for parameter in known[name].params for name in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, (file.name, words)
            found.append(name)
    assert found.count("batch") >= 4
    assert found.count("finish") >= 3


def test_slurm_counts_parts_from_one() -> None:
    """What the script runs in each task, with commands that say how they were called."""
    said = []
    for task in (1, 8):
        variables = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_COUNT": 8}
        assigned = " ".join(f"{name}={value}" for name, value in variables.items())
        told = 'safeshard() { echo "safeshard $*"; }; sbatch() { echo "sbatch $*"; }; exec() { "$@"; }'
        program = (
            f"{told}; {assigned} SLURM_ARRAY_JOB_ID=7; set -- jobs.yaml; . {shlex.quote(str(FOLDER / 'slurm.sh'))}"
        )
        said.append(subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout)
    assert "--dependency=afterok:7" in said[0]
    assert "sbatch" not in said[1]
    assert [str(Part.parse(re.findall(r"--part (\S+)", text)[0])) for text in said] == ["1/8", "8/8"]


def test_kubernetes_counts_parts_from_one() -> None:
    parts, finish = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec = parts["spec"]
    (argument,) = spec["template"]["spec"]["containers"][0]["args"]
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", 8)
    for index in (0, 7):
        program = f'safeshard() {{ echo "$*"; }}; exec() {{ "$@"; }}; JOB_COMPLETION_INDEX={index}; {argument}'
        said = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
        assert Part.parse(re.findall(r"--part (\S+)", said)[0]) == Part(index + 1, spec["completions"])
    assert finish["spec"]["suspend"] is True
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy demands


def test_the_dockerfile_has_its_stages_and_extras() -> None:
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "WORKDIR", "ENV", "RUN", "COPY", "ENTRYPOINT", "CMD"}
    assert re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE) == [
        ("python:3.12", "base"), ("base", "cpu"), ("base", "cuda"),
    ]  # fmt: skip
    extras = set(re.findall(r"^(\w+) = \[", (FOLDER.parents[1] / "pyproject.toml").read_text(), re.MULTILINE))
    assert {each for group in re.findall(r"\.\[([\w,]+)\]", text) for each in group.split(",")} <= extras
