"""A calibration that was interrupted goes on from the hidden states saved last, and ends with the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import batch, calibrate
from safeshard.streamer.calibration import hidden_states
from safeshard.streamer.calibration.hidden_states import SAVED, HiddenStates, clear_states
from safeshard.streamer.calibration.model.skeleton import Skeleton
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.run.factors import factor_layers, save_factors
from safeshard.streamer.write import staging
from safeshard.streamer.write.journal import Journal

# Runs a function and kills itself at a module of a decoder layer. Hidden states are saved at every layer.
DRIVER = """
import json, os, signal, sys
import torch
from safeshard.streamer import api
from safeshard.streamer.calibration import hidden_states
from safeshard.streamer.calibration.groups import Group

torch.set_num_threads(1)
hidden_states.INTERVAL = 0.0
factor = Group.factor

def dying(self, *args):
    if sys.argv[1] in self.modules[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return factor(self, *args)

Group.factor = dying
getattr(api, sys.argv[2])(**json.loads(sys.argv[3]))
"""


class Place:
    """The golden Llama of three layers with its calibration data, and commands on it."""

    def __init__(self, root: Path, golden: Path) -> None:
        self.root, self.golden = root, golden
        tokens = json.loads((golden / "expected/safedelta.json").read_text())["tokens"]
        (root / "data.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
        self.shared = {
            "aligned": str(golden / "aligned"),
            "calibration": str(root / "data.jsonl"),
            "samples": len(tokens),
        }

    def jobs(self, *names: str) -> dict[str, Any]:
        """Options of a batch of two kinds of jobs: "a..." on an adapter, "f..." on a full checkpoint."""
        tuned = {"a": {"adapter": str(self.golden / "ft-adapter")}, "f": {"finetuned": str(self.golden / "finetuned")}}
        defaults = self.shared | {"block_size": 48, "strength": 2.0}
        jobs = [tuned[name[0]] | {"method": "safedelta", "output": str(self.root / name)} for name in names]
        file = self.root / f"{'-'.join(names)}.yaml"
        file.write_text(json.dumps({"defaults": defaults, "jobs": jobs}))
        return {"jobs": str(file), "quiet": True}

    def calibrated(self, out: str, **options: Any) -> dict[str, Any]:
        return self.shared | {"output": str(self.root / out), "quiet": True} | options

    def files(self, out: str) -> dict[str, bytes]:
        """The names of an output's files, and the bytes of all but those that say when and where it was made."""
        told = {"manifest.json", "README.md"}
        return {p.name: b"" if p.name in told else p.read_bytes() for p in sorted((self.root / out).iterdir())}


@pytest.fixture
def place(tmp_path: Path, golden: Any, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Here hidden states are saved at every layer."""
    monkeypatch.setattr(hidden_states, "INTERVAL", 0.0)
    return Place(tmp_path, golden("llama"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoder layers that the forward pass runs, in order."""
    filled: list[str] = []
    original = Skeleton.filled

    def spy(self: Skeleton, path: str | None, *args: Any) -> Any:
        if path is not None:
            filled.append(path)
        return original(self, path, *args)

    monkeypatch.setattr(Skeleton, "filled", spy)
    return filled


def layers(*numbers: int) -> list[str]:
    return [f"model.layers.{number}" for number in numbers]


@pytest.fixture
def killed_in(python: str) -> Callable[..., None]:
    """Runs a public function in another process that is killed when the factors of a layer are made."""

    def run(layer: int, function: str, options: dict[str, Any]) -> None:
        argv = [python, "-c", DRIVER, f".layers.{layer}.", function, json.dumps(options)]
        finished = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
        assert finished.returncode == -signal.SIGKILL, finished.stderr

    return run


@pytest.mark.parametrize("layer", [1, 2])
def test_a_killed_batch_goes_on_with_the_layer_it_had_reached(
    place: Place, ran: list[str], layer: int, killed_in: Any
) -> None:
    batch(**place.jobs("a-whole", "f-whole"))
    ran.clear()
    killed_in(layer, "batch", place.jobs("a", "f"))
    assert (place.root / "a.partial" / SAVED).exists()
    batch(**place.jobs("a", "f"))
    assert ran == layers(0, 1, 2)[layer:]
    assert place.files("a") == place.files("a-whole")
    assert place.files("f") == place.files("f-whole")
    assert not list(place.root.glob("*.partial"))


def failing_in(layer: int) -> Callable[..., Any]:
    original = SafeDelta.edit

    def edit(self: SafeDelta, module: Any) -> Any:
        if f".layers.{layer}." in module.name:
            raise RunError("a sudden end")
        return original(self, module)

    return edit


@pytest.fixture
def interrupted(place: Place, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> Place:
    """Job "f", stopped in its last layer, and beside it "f-whole"."""
    batch(**place.jobs("f-whole"))
    with monkeypatch.context() as patch:
        patch.setattr(SafeDelta, "edit", failing_in(2))
        with pytest.raises(RunError, match="a sudden end"):
            batch(**place.jobs("f"))
    ran.clear()
    return place


def flip_state(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def flip_header(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(b"\xff" + file.read_bytes()[1:])


def cut(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(file, 0)


def other_torch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeshard.streamer.calibration.factors.version", lambda package: "0")


@pytest.mark.parametrize("damage", [flip_state, flip_header, cut, empty, other_torch])
def test_unusable_states_are_not_used(
    interrupted: Place, ran: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    """The first layer comes first then, and a line says so; layers that are done are run, but not worked on again."""
    damage(interrupted.root / "f.partial" / SAVED, monkeypatch)
    factored: list[str] = []
    edit = SafeDelta.edit
    monkeypatch.setattr(SafeDelta, "edit", lambda self, module: [factored.append(module.name), edit(self, module)][1])
    batch(**interrupted.jobs("f"))
    assert "starts from the first layer" in caplog.text
    assert ran == layers(0, 1, 2)
    assert len(factored) == 7
    assert all(".layers.2." in name for name in factored)
    assert interrupted.files("f") == interrupted.files("f-whole")


def test_states_past_what_another_job_needs_are_not_used(
    interrupted: Place, ran: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    batch(**interrupted.jobs("a", "f"))
    assert "layers before 2 have work left" in caplog.text
    assert ran == layers(0, 1, 2)
    assert interrupted.files("f") == interrupted.files("f-whole")
    assert interrupted.files("a").keys() == {
        "README.md",
        "manifest.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_states_beside_another_job_are_found(
    interrupted: Place, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a batch stopped in layer 2 lie beside its first job, which comes second in the next run."""
    monkeypatch.undo()
    monkeypatch.setattr(hidden_states, "INTERVAL", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(SafeDelta, "edit", failing_in(2))
        with pytest.raises(RunError, match="a sudden end"):
            batch(**interrupted.jobs("a", "f"))
    loads: list[int] = []
    load = HiddenStates.load
    monkeypatch.setattr(HiddenStates, "load", lambda *args: [loads.append(load(*args)), loads[-1]][1])
    batch(**interrupted.jobs("f", "a"))
    assert loads == [2]
    assert interrupted.files("f") == interrupted.files("f-whole")


def test_states_left_by_a_run_that_had_done_all_are_not_published(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("safeshard.streamer.run.calibrated.clear_states", lambda folders: None)
        patch.setattr("safeshard.streamer.write.writer.Writer.complete", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch(**place.jobs("f"))
    (place.root / "f.partial/hidden-states-1234.tmp").touch()
    assert (place.root / "f.partial" / SAVED).exists()
    batch(**place.jobs("f"))
    assert not [name for name in place.files("f") if name.startswith("hidden-states")]


def test_a_disk_without_room_for_states_stops_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_states, "_write", full)
    batch(**place.jobs("f"))
    assert caplog.text.count("hidden states not saved: No space left") == 2


def test_free_space_for_states_is_asked_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the jobs that share it, beside what their outputs take."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    asked = []
    for times in (0, 1000):
        monkeypatch.setattr("safeshard.streamer.plan.written.places.COPIES", times * hidden_states.COPIES)
        with pytest.raises(RequestError, match="free space") as refused:
            batch(**place.jobs("f", "a"))
        asked.append(int(refused.value.offences[0].expected.split()[0]))
    rows = json.loads((place.golden / "expected/safedelta.json").read_text())["tokens"]
    width = json.loads((place.golden / "aligned/config.json").read_text())["hidden_size"]
    assert asked[1] - asked[0] == 2 * 1000 * len(rows) * max(map(len, rows)) * width * 2  # two copies in bf16, once


def test_a_save_waits_until_it_is_worth_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times what the last save took, by a clock that each look at moves on by a second."""
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(hidden_states.time, "monotonic", tick)
    saved = HiddenStates([tmp_path], _last=0.0)
    states = torch.zeros(4)
    written = []
    for layer in range(1, 31):
        saved.save("key", layer, states)
        if (state := tmp_path / SAVED).exists():
            written.append(layer)
            state.unlink()
    assert written == [2, 12, 22]  # begun at 2, ended at 3; ten seconds on, begun at 13, ended at 14; begun at 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_come_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(hidden_states, "INTERVAL", 0.0)
    states = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer in (3, 4):
        HiddenStates([tmp_path]).save("key", layer, states)
    assert [path.name for path in tmp_path.iterdir()] == [SAVED]
    for key, first, expected in (("key", 4, 4), ("key", 9, 4), ("key", 3, 0), ("other", 4, 0)):
        back = torch.zeros_like(states)
        assert HiddenStates([tmp_path / "none", tmp_path], first).load(key, back) == expected
        assert torch.equal(back, states if expected else torch.zeros_like(states))
    clear_states([tmp_path])
    assert not list(tmp_path.iterdir())


def test_a_killed_calibrate_resumes(place: Place, ran: list[str], killed_in: Any) -> None:
    calibrate(**place.calibrated("whole"))
    ran.clear()
    killed_in(2, "calibrate", place.calibrated("out"))
    kept = {path: path.stat().st_mtime_ns for path in (place.root / "out.partial").glob("factors-*")}
    assert len(kept) == 2
    calibrate(**place.calibrated("out"))
    assert ran == layers(2)
    assert place.files("out") == place.files("whole")
    assert all((place.root / "out" / path.name).stat().st_mtime_ns == time for path, time in kept.items())
    assert not (place.root / "out.partial").exists()


def test_calibrate_killed_before_it_is_published_runs_nothing_again(
    place: Place, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(**place.calibrated("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(save_factors, "clear_states", lambda folders: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(**place.calibrated("out"))
    ran.clear()
    calibrate(**place.calibrated("out"))
    assert ran == []
    assert place.files("out") == place.files("whole")


@pytest.fixture
def unfinished(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `calibrate` leaves where it fails in the second layer."""
    save, saved = factor_layers._save, []

    def failing(*args: Any) -> Any:
        if saved:
            raise RunError("a sudden end")
        saved.append(save(*args))
        return saved[0]

    with monkeypatch.context() as patch:
        patch.setattr(factor_layers, "_save", failing)
        with pytest.raises(RunError, match="a sudden end"):
            calibrate(**place.calibrated("out"))
    return place.root / "out.partial"


def test_a_second_calibrate_is_refused_while_the_first_lives(place: Place, unfinished: Path) -> None:
    staging = unfinished
    before = {path.name: path.read_bytes() for path in staging.iterdir()}
    with (staging / "journal.jsonl").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for overwrite in (False, True):
            with pytest.raises(RequestError, match=r"no other run with this output.*wait for it"):
                calibrate(**place.calibrated("out", overwrite=overwrite))
        assert {path.name: path.read_bytes() for path in staging.iterdir()} == before
    calibrate(**place.calibrated("out"))


def test_calibrate_with_other_options_does_not_go_on(place: Place, unfinished: Path) -> None:
    with pytest.raises(RequestError, match=r"percdamp.*--overwrite") as refused:
        calibrate(**place.calibrated("out", percdamp=0.1))
    assert [offence.what for offence in refused.value.offences] == ["options.percdamp"]
    calibrate(**place.calibrated("out", percdamp=0.1, overwrite=True))
    calibrate(**place.calibrated("whole", percdamp=0.1))
    assert place.files("out") == place.files("whole")


@pytest.mark.parametrize("loss", ["the file", "a byte", "a record", "a module"])
def test_factors_that_were_damaged_meanwhile_are_made_again(
    place: Place, ran: list[str], caplog: pytest.LogCaptureFixture, loss: str, killed_in: Any
) -> None:
    calibrate(**place.calibrated("whole"))
    killed_in(2, "calibrate", place.calibrated("out"))
    file, path = place.root / "out.partial/factors-00001.safetensors", place.root / "out.partial/journal.jsonl"
    if loss == "the file":
        file.unlink()
    elif loss == "a byte":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        fingerprint = json.loads(path.read_bytes().splitlines()[0])["fingerprint"]
        with Journal.open(path, fingerprint) as journal:
            last = dict(journal.entries("layer")[-1])
            groups = last.pop("groups")
            journal.record(last.pop("kind"), **last, groups=groups[1:] if loss == "a module" else "text")
            journal.commit()
    ran.clear()
    calibrate(**place.calibrated("out"))
    # The hidden states saved last lie behind a damaged layer. Of two records of one, that which makes sense counts.
    assert ran == (layers(2) if loss == "a record" else layers(0, 1, 2))
    assert ("factored again" in caplog.text) == (loss != "a record")
    assert place.files("out") == place.files("whole")


def test_calibrate_killed_in_its_last_step_is_ended_by_the_next(
    place: Place, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(**place.calibrated("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_settle", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(**place.calibrated("out"))
    ran.clear()
    with pytest.raises(RequestError, match=r"options\.percdamp"):
        calibrate(**place.calibrated("out", percdamp=0.5))
    result = calibrate(**place.calibrated("out"))
    assert (ran, result.reverted) == ([], {})
    assert place.files("out") == place.files("whole")
    with pytest.raises(RequestError, match="exists already"):
        calibrate(**place.calibrated("out"))


@pytest.mark.parametrize("step", ["before", "after"])
@pytest.mark.parametrize("again", [False, True])
def test_calibrate_killed_while_it_replaces_factors_is_ended_by_the_next(
    place: Place, ran: list[str], monkeypatch: pytest.MonkeyPatch, step: str, again: bool
) -> None:
    """Before and after the new factors have their name, when the earlier ones lie in their folder still."""
    calibrate(**place.calibrated("whole"))
    calibrate(**place.calibrated("out", percdamp=0.5))
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "out.partial" and step == "before":
            raise ZeroDivisionError
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(staging, "_settle", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(**place.calibrated("out", overwrite=True))
    assert (place.root / ("out.partial" if step == "before" else "out") / ".replaced").is_dir()
    ran.clear()
    calibrate(**place.calibrated("out", overwrite=again))
    assert ran == [] or (again and step == "after")
    assert place.files("out") == place.files("whole")
    assert not (place.root / "out.partial").exists()


def test_factors_copied_for_another_request_are_not_taken_for_its_own(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the copy and the removal of its source, where nothing can be renamed."""
    calibrate(**place.calibrated("whole"))

    def failing(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))

    monkeypatch.setattr(Path, "rename", failing)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "remove", lambda *folders: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(**place.calibrated("out"))
    with pytest.raises(RequestError, match=r"options\.percdamp"):
        calibrate(**place.calibrated("out", percdamp=0.5))
    calibrate(**place.calibrated("out"))
    assert place.files("out") == place.files("whole")


@pytest.mark.parametrize("overwrite", [False, True])
def test_calibrate_copies_where_nothing_can_be_renamed(
    place: Place, ran: list[str], monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    calibrate(**place.calibrated("whole"))
    if overwrite:
        calibrate(**place.calibrated("out", percdamp=0.5))

    def failing(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))

    monkeypatch.setattr(Path, "rename", failing)
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "copyfile", lambda *files: 1 / 0)
        patch.setattr(staging, "remove", lambda *folders: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(**place.calibrated("out", overwrite=overwrite))
    ran.clear()
    calibrate(**place.calibrated("out", overwrite=overwrite))
    assert ran == []
    assert place.files("out") == place.files("whole")
    assert not (place.root / "out.partial").exists()
