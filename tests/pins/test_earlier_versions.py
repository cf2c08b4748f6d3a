"""What earlier versions left on disk is still read: outputs, saved factors, and journals of runs that failed.

A journal may be gone on from, with the result of an undisturbed run, or be refused: by name, with what to do, and
leaving all as it was. `write_version.py` made the folders of `written`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from write_version import WRITTEN, call, settle_times

from safeshard.manifests.errors import RequestError
from safeshard.manifests.schema import load
from safeshard.streamer import inspect, report, verify

VERSIONS = sorted(path.name for path in WRITTEN.iterdir())
MODELS = [(v, p.name) for v in VERSIONS for p in sorted((WRITTEN / v / "outputs").iterdir()) if p.name != "factors"]
FAILED = [(v, p.name) for v in VERSIONS for p in sorted((WRITTEN / v / "unfinished").iterdir())]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Version -> a copy of what it read and wrote, as the current folder: manifests name relative places."""

    def copy(version: str) -> Path:
        for folder in ("inputs", "outputs"):
            shutil.copytree(WRITTEN / version / folder, tmp_path, dirs_exist_ok=True)
        settle_times(tmp_path)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return copy


def request(version: str, name: str) -> tuple[str, dict[str, Any]]:
    """The public function and the options that an output came of."""
    function, options = json.loads((WRITTEN / version / "requests.json").read_text())[name]
    return function, options


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Up to what another processor rounds otherwise; SHA256SUMS pins bits."""
    names = {path.name for path in expected.glob("*.safetensors")}
    assert names == {path.name for path in found.glob("*.safetensors")}
    for name in names:
        was, now = load_file(expected / name), load_file(found / name)
        assert all(extra.endswith(":safe") for extra in now.keys() - was.keys())  # Grams, which later versions save too
        torch.testing.assert_close({key: now[key] for key in was}, was, rtol=1e-2, atol=1e-4)


def refusal(function: str, options: dict[str, Any]) -> RequestError | None:
    """Why a request for `out` is refused, if it is; any other error is none that users may see."""
    try:
        call(function, options, "out")
    except RequestError as refused:
        return refused
    return None


@pytest.mark.parametrize(("version", "name"), MODELS)
def test_outputs_are_whole_and_of_these_inputs(home: Any, version: str, name: str) -> None:
    out = home(version) / name
    assert verify(out, inputs=True) == []
    data = bytearray((file := next(out.glob("*.safetensors"))).read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [finding.file for finding in verify(out)] == [file.name]


@pytest.mark.parametrize(("version", "name"), MODELS)
def test_outputs_are_shown(home: Any, version: str, name: str) -> None:
    out = home(version) / name
    table, page = inspect(out, width=200), report(out).read_text()
    function = request(version, name)[0]
    manifest = load(out)
    assert manifest.tool.safeshard == version
    assert manifest.method.name == function
    assert len(manifest.modules) == 14
    for decision in {entry.decision for entry in manifest.modules}:
        assert decision in table
        assert decision in page
    assert "down_proj" in table
    assert "down_proj" in page


@pytest.mark.parametrize("version", VERSIONS)
def test_factors_serve_a_job(home: Any, version: str) -> None:
    folder = home(version)
    function, options = request(version, "delta")
    for path in (folder / "factors").iterdir():  # a copy from elsewhere: times say nothing
        path.touch()
    (folder / "aligned/model.safetensors").touch()
    call(function, options, "again")
    assert_same_tensors(folder / "again", folder / "delta")
    assert verify("again", inputs=True) == []
    decided = [[(e.name, e.decision) for e in load(folder / name).modules] for name in ("again", "delta")]
    assert decided[0] == decided[1]


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
@pytest.mark.parametrize(("version", "name"), FAILED)
def test_what_failed_goes_on_or_is_refused(home: Any, version: str, name: str, moved: bool) -> None:
    """Inputs that were copied have other times than the journal says."""
    folder = home(version)
    if moved:
        for path in folder.glob("*/*.safetensors"):
            path.touch()
    function, options = request(version, name)
    partial = folder / "out.partial"
    shutil.copytree(WRITTEN / version / "unfinished" / name, partial)
    before = content(partial)
    if refused := refusal(function, options):
        assert {offence.where for offence in refused.offences} == {str(partial / "journal.jsonl")}
        assert all("--overwrite" in offence.remedy for offence in refused.offences)
        assert content(partial) == before
        assert not (folder / "out").exists()
        call(function, options, "out", overwrite=True)
    assert not partial.exists()
    assert_same_tensors(folder / "out", folder / name)
    if name != "factors":
        assert verify("out", inputs=True) == []


@pytest.mark.parametrize(("version", "name"), FAILED)
def test_another_request_leaves_what_failed_alone(home: Any, version: str, name: str) -> None:
    folder = home(version)
    function, options = request(version, name)
    partial = folder / "out.partial"
    shutil.copytree(WRITTEN / version / "unfinished" / name, partial)
    before = content(partial)
    other = {"threshold": 0.5} if "threshold" in options else {"num_layers": 1} if name == "project" else {"seed": 9}
    with pytest.raises(RequestError, match="--overwrite"):
        call(function, options | other, "out")
    assert content(partial) == before
