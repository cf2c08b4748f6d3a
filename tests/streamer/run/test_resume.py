"""Interrupted runs: the same command goes on from the journal and ends with the same bytes, or refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import api, safelora, safemerge
from safeshard.streamer.clock import Clock
from safeshard.streamer.write import staging
from safeshard.streamer.write.journal import Journal
from safeshard.streamer.write.writer import Writer

# Runs one command and kills itself after a number of calls of a Writer method. One worker, and every record committed
# at once, so that the journal holds exactly what was finished before.
DRIVER = """
import json, os, signal, sys
import safeshard.streamer.run.one_pass as run
import safeshard.streamer.write.writer as writer
from safeshard.streamer import api

method, count, function, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
writer.COMMIT_SECONDS, run.workers_for = -1.0, lambda device: 1
original, calls = getattr(writer.Writer, method), []

def counted(self, *args, **kwargs):
    calls.append(None)
    if len(calls) > count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(writer.Writer, method, counted)
getattr(api, function)(**options)
"""


@pytest.fixture
def killed_after(python: str) -> Callable[..., None]:
    """Runs a public function in another process that is killed at the call number `count` + 1 of a Writer method."""

    def run(method: str, count: int, function: str, options: dict[str, Any]) -> None:
        argv = [python, "-c", DRIVER, method, str(count), function, json.dumps(options, default=str)]
        finished = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert finished.returncode == -signal.SIGKILL, finished.stderr

    return run


def contents(folder: Path) -> dict[str, Any]:
    """All files of an output; of the manifest all but what differs from run to run."""
    files: dict[str, Any] = {p.name: p.read_bytes() for p in folder.iterdir()}
    manifest = json.loads(files["manifest.json"])
    for key in ("run", "seal", "checksum"):
        manifest.pop(key, None)
    files["manifest.json"] = {k: v for k, v in manifest.items() if "blake3" not in k}
    return files


@pytest.fixture
def journaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The names of the tensors that this process writes, in order."""
    written: list[str] = []
    for method in ("write", "copy"):
        original = getattr(Writer, method)

        def spy(self: Writer, what: Any, *args: Any, original: Any = original) -> None:
            original(self, what, *args)
            written.append(what if isinstance(what, str) else what.name)

        monkeypatch.setattr(Writer, method, spy)
    return lambda: written


def merge_options(world: Any, **more: Any) -> dict[str, Any]:
    return world.trio() | {"threshold": 0.13, "quiet": True} | more


def full_options(world: Any, **more: Any) -> dict[str, Any]:
    """A job on full checkpoints of three shards, which it partly copies."""
    aligned = world.llama(2, seed=1)
    folders = {"aligned": world.checkpoint("aligned", aligned, 3)}
    for seed, role in enumerate(("unaligned", "finetuned")):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
        folders[role] = world.checkpoint(role, moved)
    return folders | {"num_layers": 5, "quiet": True} | more


@pytest.mark.parametrize(
    ("method", "count", "done"),  # a module: two writes, three records
    [
        ("write", 0, 0),
        ("write", 17, 16),
        ("record", 5, 2),
        ("complete", 0, 28),
        ("add_file", 2, 28),
        ("publish", 0, 28),
    ],
)
def test_a_killed_adapter_job_resumes(
    world: Any, journaled: Any, method: str, count: int, done: int, killed_after: Any
) -> None:
    options = merge_options(world)
    safemerge(**options, output=world.root / "whole")
    total = len(journaled())
    journaled().clear()
    killed_after(method, count, "safemerge", options | {"output": world.root / "out"})
    assert not (world.root / "out").exists()
    assert (world.root / "out.partial").exists()
    result = safemerge(**options, output=world.root / "out")
    assert contents(world.root / "out") == contents(world.root / "whole")
    assert not (world.root / "out.partial").exists()
    assert total == 28
    assert len(journaled()) == total - done
    assert set(result.cosines.values()).isdisjoint({None})
    assert api.verify(world.root / "out") == []


def test_a_job_killed_just_before_it_is_published_resumes(world: Any, killed_after: Any) -> None:
    """Also without its journal, which goes last."""
    options = merge_options(world)
    safemerge(**options, output=world.root / "whole")
    killed_after("publish", 0, "safemerge", options | {"output": world.root / "out"})
    (world.root / "out.partial/journal.jsonl").unlink()
    safemerge(**options, output=world.root / "out")
    assert contents(world.root / "out") == contents(world.root / "whole")


@pytest.mark.parametrize(("method", "count"), [("record", 6), ("write", 9), ("copy", 3)])
def test_a_killed_checkpoint_job_resumes(
    world: Any, journaled: Any, method: str, count: int, killed_after: Any
) -> None:
    options = full_options(world)
    safelora(**options, output=world.root / "whole")
    total = len(journaled())
    journaled().clear()
    killed_after(method, count, "safelora", options | {"output": world.root / "out"})
    safelora(**options, output=world.root / "out")
    assert contents(world.root / "out") == contents(world.root / "whole")
    assert len(journaled()) < total or method == "record"
    assert api.verify(world.root / "out") == []


def test_an_error_underway_keeps_what_was_finished(world: Any, journaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = merge_options(world)
    safemerge(**options, output=world.root / "whole")
    total = len(journaled())
    journaled().clear()
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", failing_after(8))
        with pytest.raises(RunError, match="no more"):
            safemerge(**options, output=world.root / "out")
    before = len(journaled())
    assert 0 < before <= 8
    journaled().clear()
    safemerge(**options, output=world.root / "out")
    assert len(journaled()) <= total - before + 8  # the modules under way in each worker are done again
    assert contents(world.root / "out") == contents(world.root / "whole")


def test_a_failure_before_the_first_tensor_leaves_no_trace(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "write", failing_after(0))
    with pytest.raises(RunError, match="no more"):
        safemerge(**merge_options(world), output=world.root / "out")
    assert list(world.root.glob("out*")) == []


@pytest.fixture
def interrupted(world: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a run that ended early; its unfinished output is there."""
    options = merge_options(world) | {"output": world.root / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", failing_after(9))
        with pytest.raises(RunError, match="no more"):
            safemerge(**options)
    return options


def failing_after(count: int) -> Callable[..., None]:
    """A `Writer.write` that fails after a number of calls."""
    original, calls = Writer.write, []

    def write(self: Writer, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) > count:
            raise RunError("no more")
        original(self, name, tensor)

    return write


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"threshold": 0.2}, "options.threshold"),
        ({"weights": (0.5, 0.5)}, "options.weights.0"),
        ({"combine": "exact"}, "options.combine"),
    ],
)
def test_another_request_is_refused_by_name(
    interrupted: dict[str, Any], world: Any, change: dict[str, Any], named: str
) -> None:
    options = interrupted
    with pytest.raises(RequestError) as refused:
        safemerge(**options | change)
    assert named in {o.what for o in refused.value.offences}
    assert all("--overwrite" in o.remedy for o in refused.value.offences)
    assert not options["output"].exists()
    safemerge(**options)  # the unfinished output is still good


def test_overwrite_starts_anew(interrupted: dict[str, Any], world: Any, journaled: Any) -> None:
    options = interrupted
    safemerge(**options | {"threshold": 0.2, "overwrite": True})
    assert len(journaled()) == 28
    fresh = safemerge(**options | {"threshold": 0.2, "output": world.root / "fresh"})
    assert contents(options["output"]) == contents(fresh.output)


def test_changed_weights_under_the_same_header_are_noticed(
    interrupted: dict[str, Any], world: Any, load_tensors: Any
) -> None:
    options = interrupted
    file = options["adapter"] / "adapter_model.safetensors"
    save_file({n: t + 1 for n, t in load_tensors(options["adapter"]).items()}, file, {"format": "pt"})
    with pytest.raises(RequestError, match="adapter_model"):
        safemerge(**options)


@pytest.mark.parametrize("loss", ["the file", "a byte", "the end"])
def test_what_is_lost_is_done_again(
    interrupted: dict[str, Any], world: Any, journaled: Any, caplog: pytest.LogCaptureFixture, loss: str
) -> None:
    options, part = interrupted, world.root / "out.partial/adapter_model.safetensors.part"
    content = bytearray(part.read_bytes())
    if loss == "the file":
        part.unlink()
    elif loss == "a byte":
        first = json.loads((part.parent / "journal.jsonl").read_text().splitlines()[2])["name"]
        offset = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[first]["data_offsets"][0]
        content[8 + int.from_bytes(content[:8], "little") + offset] ^= 1
        part.write_bytes(content)
    else:
        os.truncate(part, 8)
    journaled().clear()
    safemerge(**options)
    assert "damaged" in caplog.text
    assert len(journaled()) < 28 or loss != "a byte"
    fresh = safemerge(**options | {"output": world.root / "fresh"})
    assert contents(options["output"]) == contents(fresh.output)


def test_a_second_run_at_once_is_refused(interrupted: dict[str, Any], world: Any) -> None:
    options = interrupted
    with (world.root / "out.partial/journal.jsonl").open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)  # as a run underway does
        for overwrite in (False, True):
            with pytest.raises(RequestError, match="no other run"):
                safemerge(**options, overwrite=overwrite)
    safemerge(**options)


def test_a_second_run_is_told_which_process_is_first(interrupted: dict[str, Any], world: Any) -> None:
    with Journal.claim(world.root / "out.partial/journal.jsonl"), pytest.raises(RequestError, match=str(os.getpid())):
        safemerge(**interrupted)


@pytest.fixture
def ending(world: Any, killed_after: Any) -> dict[str, Any]:
    """The options of a run that was killed in its last step: the output has its name, and a journal still."""
    options = merge_options(world) | {"output": world.root / "out"}
    killed_after("add_file", 0, "safemerge", options)
    journal = (world.root / "out.partial/journal.jsonl").read_bytes()
    safemerge(**options)
    (world.root / "out/journal.jsonl").write_bytes(journal)
    return options


def test_a_run_killed_in_its_last_step_is_ended_by_the_next(ending: dict[str, Any], world: Any, journaled: Any) -> None:
    out: Path = world.root / "out"
    journaled().clear()
    assert api.verify(out) == []
    (out / ".replaced").mkdir()
    (out / ".replaced/manifest.json").touch()
    for overwrite in (True, False):
        with (out / "journal.jsonl").open("rb") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            with pytest.raises(RequestError, match="no other run"):
                safemerge(**ending, overwrite=overwrite)
    result = safemerge(**ending)
    assert result.manifest is not None
    assert journaled() == []
    assert not list(out.glob(".replaced")) + list(out.glob("journal*"))
    assert api.verify(out) == []
    with pytest.raises(RequestError, match="exists already"):
        safemerge(**ending)


def test_an_output_that_lacks_bytes_is_not_taken_for_finished(ending: dict[str, Any], world: Any) -> None:
    os.truncate(world.root / "out/adapter_model.safetensors", 100)
    with pytest.raises(RequestError, match="exists already"):
        safemerge(**ending)
    safemerge(**ending, overwrite=True)
    assert api.verify(world.root / "out") == []


def test_overwrite_goes_on_with_the_same_request(interrupted: dict[str, Any], world: Any, journaled: Any) -> None:
    journaled().clear()
    safemerge(**interrupted, overwrite=True)
    assert 0 < len(journaled()) < 28


def test_an_input_that_changes_underway_is_noticed(
    interrupted: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(self: Writer, name: str, tensor: torch.Tensor) -> None:
        os.utime(interrupted["adapter"] / "adapter_model.safetensors", (1, 1))
        original(self, name, tensor)

    original = Writer.write
    monkeypatch.setattr(Writer, "write", changing)
    with pytest.raises(RunError, match="changed while it was read"):
        safemerge(**interrupted)
    assert list(world.root.glob("out*")) == []


def test_small_files_of_an_earlier_attempt_are_not_published(world: Any, killed_after: Any) -> None:
    options = merge_options(world) | {"output": world.root / "out"}
    killed_after("add_file", 0, "safemerge", options)
    (world.root / "out.partial/tokenizer.json").write_text("stale")
    safemerge(**options)
    assert not (world.root / "out/tokenizer.json").exists()
    assert api.verify(world.root / "out") == []


def test_a_table_of_scores_is_there_whole_or_not_at_all(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, table = world.trio(), world.root / "scores.csv"
    options = {role: paths[role] for role in ("aligned", "unaligned", "adapter")} | {"output": table, "quiet": True}
    api.score(**options)
    before = table.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="the disk is full"):
            api.score(**options, overwrite=True)
    assert table.read_bytes() == before
    assert [p.name for p in world.root.iterdir() if "scores" in p.name] == ["scores.csv"]


def test_a_folder_that_somebody_filled_is_left_alone(world: Any) -> None:
    """It is neither published with the output nor removed after a failure."""
    options = merge_options(world) | {"output": world.root / "out"}
    foreign = world.root / "out.partial/thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(RequestError, match="another folder"):
            safemerge(**options, overwrite=overwrite)
    assert [p.name for p in foreign.parent.iterdir()] == ["thesis.txt"]


def test_data_reaches_the_disk_before_the_journal_says_so(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a run is abandoned: a journal ahead of its data would resume to zeros after a power cut."""
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)

    def failing(self: Clock, stage: str, start: float, nbytes: int = 0) -> None:
        if stage == "write":
            raise RunError("no")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "fdatasync", fsync)
    monkeypatch.setattr(Clock, "add", failing)
    with pytest.raises(RunError, match="no"):
        safemerge(**merge_options(world), output=world.root / "out")
    assert synced[-2:] == ["adapter_model.safetensors.part", "journal.jsonl"]


def test_space_that_an_unfinished_output_holds_is_not_asked_for_again(
    world: Any, interrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = interrupted
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64))
    with pytest.raises(RequestError, match="free space"):
        safemerge(**options | {"output": world.root / "elsewhere"})
    safemerge(**options)


def test_a_killed_batch_resumes(world: Any, journaled: Any, killed_after: Any) -> None:
    paths = {role: str(path) for role, path in world.trio().items()}
    for name in ("whole", "out"):
        (world.root / f"{name}.yaml").write_text(json.dumps({
            "defaults": {k: v for k, v in paths.items() if k != "adapter"},
            "jobs": [
                {"method": "safemerge", "adapter": paths["adapter"], "matrix": {"threshold": [0.1, 0.2]},
                 "output": f"{world.root}/{name}/merge-{{threshold}}"},
                {"method": "safelora", "adapter": paths["adapter"], "num_layers": 4,
                 "output": f"{world.root}/{name}/lora"},
            ],
        }))  # fmt: skip
    api.batch(world.root / "whole.yaml", quiet=True)
    total = len(journaled())
    journaled().clear()
    killed_after("write", 20, "batch", {"jobs": world.root / "out.yaml", "quiet": True})
    api.batch(world.root / "out.yaml", quiet=True)
    assert len(journaled()) < total
    for job in ("merge-0.1", "merge-0.2", "lora"):
        assert contents(world.root / "out" / job) == contents(world.root / "whole" / job)


UP = "model.layers.0.mlp.up_proj"
FORGED: dict[str, list[dict[str, Any]]] = {
    "module": [
        {},
        *({"entry": entry} for entry in (None, "text", {}, [1])),
        {"entry": {"name": 3, "decision": "kept"}},
        {"entry": {"name": "lm_head", "decision": "kept", "cosine": 0.1}},
        {"entry": {"name": UP, "decision": "eaten"}},
        {"entry": {"name": UP, "decision": "kept", "cosine": "high"}},
        {"entry": {"name": "model.layers.1.mlp.down_proj", "decision": "reverted"}},
    ],
    "cosine": [
        {},
        {"name": [], "cosine": 0.5},
        {"name": "no such module", "cosine": -1.0},
        {"name": UP, "cosine": "low"},
        {"name": UP, "cosine": {"a": 1}},
    ],
    "fallback": [{}, {"entry": [1]}, {"entry": {"asked": 1}}],
    "tensor": [{}, {"name": UP}, {"name": [UP], "blake3": "00"}, {"name": f"{UP}.weight", "blake3": 3}],
}


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.parametrize("method", ["safemerge", "safelora"])
def test_records_that_make_no_sense_lose_work_alone(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, kind: str
) -> None:
    """A journal whose lines are whole, but say what no run writes."""
    options = merge_options(world) | {"output": world.root / "out"}
    if method == "safelora":  # which ranks all cosines, the journal's among them
        options = {k: v for k, v in options.items() if k not in ("safe_adapter", "threshold")} | {"num_layers": 3}
    function = getattr(api, method)
    function(**options | {"output": world.root / "whole"})
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", failing_after(5))
        with pytest.raises(RunError, match="no more"):
            function(**options)
    path = world.root / "out.partial/journal.jsonl"
    fingerprint = json.loads(path.read_bytes().splitlines()[0])["fingerprint"]
    with Journal.open(path, fingerprint) as journal:
        for payload in FORGED[kind]:
            journal.record(kind, **payload)
        journal.commit()
    function(**options)
    assert "makes no sense" in caplog.text
    assert contents(world.root / "out") == contents(world.root / "whole")
    assert api.verify(world.root / "out") == []


@pytest.fixture
def no_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets renames fail as on mounts that have none: of folders alone, or of files as well."""

    def forbid(number: int, files: bool = False) -> None:
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if files or self.is_dir():
                raise OSError(number, os.strerror(number), str(self))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)

    return forbid


@pytest.mark.parametrize(
    ("number", "files", "overwrite"),
    [(errno.EXDEV, False, False), (errno.EPERM, True, False), (errno.ENOSYS, False, True), (errno.ENOSYS, True, True)],
)
def test_where_nothing_can_be_renamed_the_output_is_copied(
    world: Any, no_rename: Any, caplog: pytest.LogCaptureFixture, number: int, files: bool, overwrite: bool
) -> None:
    options = full_options(world)
    safelora(**options, output=world.root / "whole")
    if overwrite:
        safelora(**options | {"num_layers": 1}, output=world.root / "out")
    no_rename(number, files)
    safelora(**options, output=world.root / "out", overwrite=overwrite)
    assert os.strerror(number) in caplog.text
    assert contents(world.root / "out") == contents(world.root / "whole")
    assert api.verify(world.root / "out") == []
    assert {p.name for p in world.root.glob("out*")} == {"out"}
    assert not (world.root / "out/journal.jsonl").exists()


@pytest.mark.parametrize("copied", [0, 3, 6, 9])  # of seven files
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_copy_that_was_killed_is_finished_by_the_next_run(
    world: Any, no_rename: Any, journaled: Any, monkeypatch: pytest.MonkeyPatch, copied: int, overwrite: bool
) -> None:
    """Killed after each file, and between the copy and the removal of its source: never is there a half output that
    looks whole."""
    options = full_options(world) | {"output": world.root / "out", "overwrite": overwrite}
    out, partial = world.root / "out", world.root / "out.partial"
    safelora(**options | {"output": world.root / "whole"})
    if overwrite:
        safelora(**options | {"num_layers": 1})
    no_rename(errno.ENOSYS)
    copyfile, calls = shutil.copyfile, []

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > copied:
            raise KeyboardInterrupt
        copyfile(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", killed)
        patch.setattr(staging, "remove", lambda *folders: (_ for _ in ()).throw(KeyboardInterrupt))  # no tidying up
        with pytest.raises(KeyboardInterrupt):
            safelora(**options)
    assert (partial / "manifest.json").is_file()
    assert (out / "journal.jsonl").is_file()
    whole = (out / "manifest.json").is_file()
    assert whole == (copied >= len(list((world.root / "whole").iterdir())))
    journaled().clear()
    safelora(**options)
    assert journaled() == [] or (overwrite and whole)
    assert contents(out) == contents(world.root / "whole")
    assert api.verify(out) == []
    assert {p.name for p in world.root.glob("out*")} == {"out"}


def test_a_copy_that_fails_leaves_no_output_and_the_whole_beside(
    world: Any, no_rename: Any, journaled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = merge_options(world) | {"output": world.root / "out"}
    no_rename(errno.EPERM)
    with monkeypatch.context() as patch:

        def full(source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(RunError, match="disk is full"):
            safemerge(**options)
    assert {p.name for p in world.root.glob("out*")} == {"out.partial"}
    journaled().clear()
    safemerge(**options)
    assert journaled() == []
    assert api.verify(world.root / "out") == []


def test_a_folder_that_came_meanwhile_is_not_emptied_by_a_copy(world: Any, no_rename: Any, journaled: Any) -> None:
    options = merge_options(world) | {"output": world.root / "out"}
    no_rename(errno.EXDEV)
    publish = staging.publish

    def late(*args: Any) -> None:
        (world.root / "out").mkdir()
        (world.root / "out/notes.txt").write_text("not ours")
        publish(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "publish", late)
        with pytest.raises(RunError, match=os.strerror(errno.ENOTEMPTY)):
            safemerge(**options)
    assert [path.name for path in (world.root / "out").iterdir()] == ["notes.txt"]
    (world.root / "out/notes.txt").unlink()
    (world.root / "out").rmdir()
    journaled().clear()
    safemerge(**options)
    assert journaled() == []


def test_a_folder_with_a_journal_of_its_own_is_no_half_copy(interrupted: dict[str, Any], world: Any) -> None:
    (world.root / "out").mkdir()
    (world.root / "out/journal.jsonl").write_text("today: nothing")
    with pytest.raises(RequestError, match="exists already"):
        safemerge(**interrupted)
    assert (world.root / "out/journal.jsonl").read_text() == "today: nothing"
