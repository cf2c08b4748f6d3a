"""The bytes that about sixty small jobs write are those of SHA256SUMS, whatever was rearranged since.

Where a change means to change bytes, `python tests/pins/pinned_jobs.py` writes SHA256SUMS and DECISIONS.csv anew; its
commit says why. Copies, small files and element-wise results have the same bits everywhere. Products, decompositions
and forward passes may round differently on another processor, or by another torch: there a test whose hashes differ is
skipped and says so. Decisions are compared everywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pinned_inputs import write_inputs
from pinned_jobs import DECISIONS, JOBS, Pinned, decisions, machine, read_decisions, read_sums, run, sums

MACHINE, SUMS = read_sums()
CHOSEN = read_decisions()
COSINE = 2e-5  # what rounding elsewhere may do to the five places of DECISIONS.csv
BY_NAME = {job.name: job for job in JOBS}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pins") / "inputs"
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def input_sums(inputs: Path) -> dict[str, str]:
    """Taken before any job writes into the folder."""
    return sums(inputs)


@pytest.fixture
def place(inputs: Path, input_sums: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the inputs, which is the current one: scores name their sources as they were given."""
    monkeypatch.chdir(inputs)
    return inputs


def otherwise(job: Pinned) -> str:
    """How this machine differs from that of SHA256SUMS, as far as it may change bits of this job."""
    decisive = {"elementwise": (), "algebra": ("torch", "processor", "arithmetic"), "forward": tuple(MACHINE)}
    here = machine()
    return ", ".join(
        f"{key} {here[key]}, not {MACHINE[key]}" for key in decisive[job.rounding] if here[key] != MACHINE[key]
    )


def test_the_inputs_are_the_same_bytes(input_sums: dict[str, str]) -> None:
    """Where they are not, the hashes of outputs say nothing."""
    assert input_sums == {path: digest for path, digest in SUMS.items() if path.startswith("inputs/")}


def test_every_pin_has_its_job() -> None:
    assert {path.split("/")[0] for path in SUMS} == {"inputs", *BY_NAME}
    assert {output.split("/")[0] for output, _ in CHOSEN} <= BY_NAME.keys()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_bytes_and_decisions(job: Pinned, place: Path) -> None:
    for needed in (job.after, job.name):
        if needed and not (place / needed).exists():
            run(BY_NAME[needed])
    written = sums(place / job.name)
    expected = {path: digest for path, digest in SUMS.items() if path.split("/")[0] == job.name}
    assert written.keys() == expected.keys()
    made = decisions(place / job.name)
    assert {key: decision for key, (decision, _) in made.items()} == {
        key: decision for key, (decision, _) in CHOSEN.items() if key[0].split("/")[0] == job.name
    }, DECISIONS.name
    for key, (_, cosine) in made.items():
        assert float(cosine or "nan") == pytest.approx(float(CHOSEN[key][1] or "nan"), abs=COSINE, nan_ok=True), key
    computed = {path for path in expected if path.endswith(".safetensors") or "/" not in path}
    assert {p: d for p, d in written.items() if p not in computed} == {
        p: d for p, d in expected.items() if p not in computed
    }
    if written != expected and (why := otherwise(job)):
        differing = sorted(path for path in expected if written[path] != expected[path])
        pytest.skip(f"the bits of {', '.join(differing)} depend on the machine: {why}")
    assert written == expected
