"""Folders and files of others: none is removed, none is written to, whatever lies where an output is to be written."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import api, calibrate, safemerge
from safeshard.streamer.plan import ours
from safeshard.streamer.write import writer as writers
from safeshard.streamer.write.writer import Writer

VICTIM = b"precious"


@pytest.fixture
def job(world: Any) -> dict[str, Any]:
    return world.trio() | {"output": world.root / "out", "threshold": 0.13, "quiet": True}


@pytest.fixture
def partial(job: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that was interrupted once all its tensors were written."""

    def stop(self: Writer) -> None:
        raise RunError("a sudden end")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "complete", stop)
        with pytest.raises(RunError, match="a sudden end"):
            safemerge(**job)
    folder: Path = world.root / "out.partial"
    assert {path.name for path in folder.iterdir()} == {"journal.jsonl", "adapter_model.safetensors.part"}
    return folder


def everything(folder: Path) -> dict[str, bytes | str]:
    """Every name below a folder, with its bytes or where its link leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": '{"name": "My extension", "manifest_version": 3}', "background.js": "x"},
        {"manifest.json": ""},
        {"journal.jsonl": "", "thesis.txt": "precious"},
        {"journal.jsonl": "today: nothing"},
        {"journal.jsonl": '{"journal": "mine"}\n', "model.safetensors": "x"},
        {"factors.json": '{"factors": [2, 3]}'},
        {"adapter_model.safetensors.part": "x"},
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["out.partial", "out"])
def test_a_foreign_folder_is_left_alone(
    job: dict[str, Any], world: Any, files: dict[str, str], overwrite: bool, place: str
) -> None:
    """Whatever its files are called. A dry run says so too."""
    folder = world.root / place
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = everything(world.root)
    for dry_run in (True, False):
        with pytest.raises(RequestError, match=str(folder)):
            safemerge(**job, overwrite=overwrite, dry_run=dry_run)
        with pytest.raises(RequestError, match=str(folder)):
            calibrate(aligned=job["aligned"], output=job["output"], overwrite=overwrite, dry_run=dry_run)
    assert everything(world.root) == before


@pytest.mark.parametrize("name", ["thesis.txt", "weights.safetensors", "notes/today.md", "checkpoint.pt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_somebody_put_into_an_unfinished_output_stays(
    job: dict[str, Any], partial: Path, name: str, overwrite: bool
) -> None:
    stranger = partial / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(VICTIM)
    before = everything(partial)
    for change in ({}, {"threshold": 0.5}):
        with pytest.raises(RequestError, match=f"also {name.split('/')[0]}.*move it elsewhere"):
            safemerge(**job | change, overwrite=overwrite)
    assert everything(partial) == before
    stranger.unlink()
    if "/" in name:
        stranger.parent.rmdir()
    safemerge(**job, overwrite=overwrite)
    assert api.verify(job["output"]) == []


@pytest.mark.parametrize("name", ["eval.json", "runs/log.txt", "weights.gguf"])
def test_what_somebody_put_into_an_output_is_not_replaced_with_it(job: dict[str, Any], name: str) -> None:
    safemerge(**job)
    stranger = job["output"] / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(VICTIM)
    before = everything(job["output"])
    with pytest.raises(RequestError, match=f"also holds {name.split('/')[0]}"):
        safemerge(**job | {"threshold": 0.5}, overwrite=True)
    assert everything(job["output"]) == before


def test_what_comes_while_a_job_runs_stays(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the earlier output that is to be replaced, and into the folder where the new one is written."""
    safemerge(**job)
    complete = Writer.complete

    def disturbed(self: Writer) -> None:
        (place / "thesis.txt").write_bytes(VICTIM)
        complete(self)

    partial = job["output"].with_name("out.partial")
    for place in (job["output"], partial):
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "complete", disturbed)
            with pytest.raises(RunError, match=r"thesis\.txt.*move it elsewhere"):
                safemerge(**job | {"threshold": 0.5}, overwrite=True)
        assert (place / "thesis.txt").read_bytes() == VICTIM
        (place / "thesis.txt").unlink()
        assert api.verify(job["output"]) == []
    safemerge(**job | {"threshold": 0.5}, overwrite=True)
    assert api.verify(job["output"]) == []
    assert not partial.exists()


def test_a_failure_leaves_what_is_not_ours(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    partial = job["output"].with_name("out.partial")

    def failing(self: Writer, name: str, tensor: Any) -> None:
        (partial / "thesis.txt").write_bytes(VICTIM)
        raise RunError("a sudden end")

    monkeypatch.setattr(Writer, "write", failing)
    with pytest.raises(RunError, match="a sudden end"):
        safemerge(**job)
    assert (partial / "thesis.txt").read_bytes() == VICTIM


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing", "pipe"])
def test_what_lies_in_the_place_of_the_work_folder(job: dict[str, Any], world: Any, kind: str) -> None:
    partial = world.root / "out.partial"
    (world.root / "elsewhere").mkdir()
    if kind == "file":
        partial.write_bytes(VICTIM)
    elif kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.symlink_to("elsewhere" if "folder" in kind else "nowhere")
    with pytest.raises(RequestError, match="a file or a link"):
        safemerge(**job)
    assert os.path.lexists(partial)
    assert list((world.root / "elsewhere").iterdir()) == []


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "symlink": lambda link, target: link.symlink_to(target),
    "hard link": lambda link, target: link.hardlink_to(target),
    "dangling symlink": lambda link, target: link.symlink_to(target.with_name("new")),
    "pipe": lambda link, target: os.mkfifo(link),
}


@pytest.mark.parametrize("name", ["adapter_model.safetensors.part", "journal.jsonl"])
@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_planted_link_is_not_followed(
    job: dict[str, Any], partial: Path, tmp_path: Path, name: str, kind: str, overwrite: bool
) -> None:
    """Neither for the weights nor for the journal: the file that it leads to keeps its bytes."""
    victim = tmp_path / "victim"
    original = (partial / name).read_bytes()
    victim.write_bytes(original if kind == "hard link" else VICTIM)
    before = victim.read_bytes()
    (partial / name).unlink()
    LINKS[kind](partial / name, victim)
    with pytest.raises(RequestError):
        safemerge(**job, overwrite=overwrite)
    assert victim.read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert not job["output"].exists()


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "adapter_config.json", "adapter_model.safetensors"])
def test_links_in_the_place_of_other_files_are_not_followed(
    job: dict[str, Any], partial: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(VICTIM)
    if name.endswith(".safetensors"):
        (partial / f"{name}.part").unlink()
    (partial / name).symlink_to(victim)
    try:
        safemerge(**job)
    except RequestError:
        assert name.endswith(".safetensors")
    else:
        assert not (job["output"] / name).is_symlink()
        assert api.verify(job["output"]) == []
    assert victim.read_bytes() == VICTIM


def test_a_work_folder_that_is_replaced_by_a_link_underway(
    job: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened later, is opened in a folder that is none."""
    elsewhere = world.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "README.md").write_bytes(VICTIM)
    add_file = Writer.add_file

    def swapped(self: Writer, name: str, data: bytes) -> None:
        if not self.staging.is_symlink():
            self.staging.rename(world.root / "aside")
            self.staging.symlink_to(elsewhere)
        add_file(self, name, data)

    monkeypatch.setattr(writers.Writer, "add_file", swapped)
    with pytest.raises((RunError, RequestError)):
        safemerge(**job)
    assert everything(elsewhere) == {"README.md": VICTIM}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_are_what_the_umask_leaves(job: dict[str, Any], mask: int) -> None:
    before = os.umask(mask)
    try:
        safemerge(**job)
        report = api.report(job["output"], file=job["output"].parent / "page.html")
        table = job["output"].parent / "table.csv"
        api.score(**{k: job[k] for k in ("aligned", "unaligned", "adapter")}, output=table, quiet=True)
    finally:
        os.umask(before)
    files = [*job["output"].iterdir(), report, table]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_a_journal_names_the_files_of_its_output(partial: Path) -> None:
    first = json.loads((partial / "journal.jsonl").read_text().splitlines()[0])
    assert first["fingerprint"]["files"] == ["adapter_model.safetensors"]
    assert ours.strangers(partial) == []
    assert ours.remove(partial) == []
    assert not partial.exists()


def test_a_run_at_work_there_is_no_stranger(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker's folder may change between two looks at it: its journal gets a first line, its files go."""
    journal = partial / "journal.jsonl"
    whole = journal.read_bytes()
    (partial / "adapter_model.safetensors.part").unlink()
    journal.write_bytes(b"")
    known, is_ours = ours._known, ours._is_ours

    def known_before_it_was_written(folder: Path) -> set[str] | None:
        found = known(folder)
        journal.write_bytes(whole)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ours, "_known", known_before_it_was_written)
        assert ours.strangers(partial) == []
    (partial / "adapter_model.safetensors.part").write_bytes(b"")

    def gone(folder: Path, name: str, names: set[str]) -> bool:
        (partial / "adapter_model.safetensors.part").unlink(missing_ok=True)
        return is_ours(folder, name, names)

    with monkeypatch.context() as patch:
        patch.setattr(ours, "_is_ours", gone)
        assert ours.strangers(partial) == []
