"""The command line as a user meets it: output, exit status, messages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard import streamer
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer import api
from safeshard.streamer.cli import app as cli
from safeshard.streamer.cli import process
from safeshard.streamer.cli.app import main
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.safemerge import SafeMerge
from safeshard.streamer.options import RunOptions
from safeshard.streamer.run import runner


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Run the command; return exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    status = stop.value.code
    return (status if isinstance(status, int) else 0), out, err


@pytest.fixture
def merge_args(world: Any) -> list[object]:
    paths = world.trio()
    args = ["safemerge", "--quiet", "--output", world.root / "out"]
    for name, path in paths.items():
        args += [f"--{name.replace('_', '-')}", path]
    return args


def test_safemerge_inspect_verify(capsys: pytest.CaptureFixture[str], world: Any, merge_args: list[object]) -> None:
    out = world.root / "out"
    status, stdout, _ = run(capsys, *merge_args, "--json")
    assert status == 0
    [outcome] = json.loads(stdout.splitlines()[-1])
    assert outcome["modules"] == outcome["expected"] == 14
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "README.md"} == {
        p.name for p in out.iterdir()
    }
    status, stdout, _ = run(capsys, "inspect", out)
    assert status == 0
    assert "q_proj" in stdout
    assert run(capsys, "verify", out)[0] == 0
    data = bytearray((out / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "adapter_model.safetensors").write_bytes(data)
    status, stdout, _ = run(capsys, "verify", out)
    assert status == 1
    assert "adapter_model.safetensors" in stdout


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], world: Any, merge_args: list[object]) -> None:
    merge_args.remove("--quiet")
    status, stdout, _ = run(capsys, *merge_args, "--dry-run")
    assert status == 0
    assert "modules 14 of 14 expected" in stdout
    assert "nothing was written" in stdout
    assert not (world.root / "out").exists()
    assert not (world.root / "out.partial").exists()


def test_weights_take_two_values(capsys: pytest.CaptureFixture[str], world: Any, merge_args: list[object]) -> None:
    assert run(capsys, *merge_args, "--weights", "0.6", "0.4", "--threshold", "1.01")[0] == 0
    manifest = json.loads((world.root / "out/manifest.json").read_text())
    assert manifest["method"]["options"]["weights"] == [0.6, 0.4]
    assert {m["decision"] for m in manifest["modules"]} == {"merged"}


def test_score_takes_many_adapters(capsys: pytest.CaptureFixture[str], world: Any) -> None:
    paths = world.trio()
    table = world.root / "scores.csv"
    status, stdout, _ = run(
        capsys, "score", "--aligned", paths["aligned"], "--unaligned", paths["unaligned"],
        "--adapter", paths["adapter"], paths["safe_adapter"], "--output", table,
    )  # fmt: skip
    assert status == 0
    assert "model.layers.0.self_attn.q_proj" in stdout
    rows = table.read_text().splitlines()
    assert rows[0] == "source,module,cosine"
    assert len(rows) == 1 + 2 * 14


@pytest.mark.parametrize("command", ["safemerge", "safelora", "scale", "score", "batch", "inspect", "verify", "report"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, stdout, _ = run(capsys, command, "--help")
    assert status == 0
    assert "Usage: safeshard " + command in stdout


def test_existing_output_is_refused(capsys: pytest.CaptureFixture[str], world: Any, merge_args: list[object]) -> None:
    (world.root / "out").mkdir()
    status, _, stderr = run(capsys, *merge_args)
    assert status == 2
    assert "exists" in stderr
    assert "--overwrite" in stderr


def test_overwrite_replaces_only_what_safeshard_wrote(
    capsys: pytest.CaptureFixture[str], world: Any, merge_args: list[object]
) -> None:
    out: Path = world.root / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert run(capsys, *merge_args, "--overwrite")[0] == 2
    assert (out / "thesis.txt").read_text() == "precious"
    (out / "thesis.txt").unlink()
    assert run(capsys, *merge_args, "--overwrite")[0] == 0
    first = (out / "manifest.json").read_bytes()
    assert run(capsys, *merge_args, "--overwrite", "--threshold", "0.5")[0] == 0
    assert (out / "manifest.json").read_bytes() != first
    assert [p.name for p in world.root.iterdir() if "partial" in p.name or "replaced" in p.name] == []


@pytest.mark.parametrize("spelling", ["--adapter={}", "--adapter {}"])
def test_several_values_follow_either_spelling(capsys: pytest.CaptureFixture[str], world: Any, spelling: str) -> None:
    paths = world.trio()
    first = spelling.format(paths["adapter"]).split(" ")
    base = ["score", "--aligned", paths["aligned"], "--unaligned", paths["unaligned"], "--quiet", "--json"]
    status, stdout, _ = run(capsys, *base, *first, paths["safe_adapter"])
    assert status == 0
    assert [r["source"] for r in json.loads(stdout)] == [str(paths["adapter"]), str(paths["safe_adapter"])]


def test_score_names_equal_last_parts_in_full(capsys: pytest.CaptureFixture[str], world: Any) -> None:
    paths = world.trio()
    twins = [world.root / "alice" / "adapter", world.root / "bob" / "adapter"]
    for twin in twins:
        shutil.copytree(paths["adapter"], twin)
    base = ["score", "--aligned", paths["aligned"], "--unaligned", paths["unaligned"], "--adapter"]
    status, stdout, _ = run(capsys, *base, *twins, paths["safe_adapter"])
    assert status == 0
    assert stdout.splitlines()[0].split() == ["module", *map(str, twins), paths["safe_adapter"].name]


@pytest.mark.parametrize("place", ["folder.csv", "file/table.csv", "n" * 300 + ".csv"])
def test_score_refuses_a_bad_table_before_it_computes(
    capsys: pytest.CaptureFixture[str], world: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.root / "folder.csv").mkdir()
    (world.root / "file").touch()
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("it computed"))
    options = ["--aligned", "a", "--unaligned", "u", "--adapter", "x", "--overwrite"]
    status, _, stderr = run(capsys, "score", *options, "--output", world.root / place)
    assert status == 2
    assert "--output" in stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("safelora --aligned a --unaligned u --adapter x --output o", "give either --threshold or --num-layers"),
        ("scale --aligned a --adapter x --output o --factor 1 --device gpu",
         "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("scale --aligned a --adapter x --output o --factor 1 --memory lots",
         "--memory: expected a size such as 2GiB, got 'lots'"),
        ("safelora --aligned a --unaligned u --adapter x --output o --num-layers 0",
         "--num-layers: expected greater than 0, got 0"),
    ],
)  # fmt: skip
def test_messages_read_as_sentences(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert run(capsys, *argv.split()) == (2, "", f"safeshard: {message}\n")


@pytest.mark.parametrize("options", ["threshold: yes", "num_layers: true", "adapter: no", "weights: [true, 0.2]"])
def test_truth_values_are_no_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str) -> None:
    method = "safemerge" if "weights" in options else "safelora"
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(f"jobs:\n  - {{method: {method}, aligned: a, unaligned: u, output: o, {options}}}\n")
    status, _, stderr = run(capsys, "batch", jobs)
    assert status == 2
    assert f"{options.partition(':')[0]}: expected a value other than true and false" in stderr


def test_a_wrong_default_is_reported_once_beside_the_jobs_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(
        "defaults: {alinged: a, aligned: a, adapter: x}\n"
        "jobs: [{method: scale, factor: 1, output: o}, {method: scale, output: p},\n"
        "       {method: scale, factor: x, output: q}]"
    )
    status, _, stderr = run(capsys, "batch", jobs)
    assert status == 2
    assert stderr.count("defaults.alinged") == 1
    assert "3 problems" in stderr
    assert "job 2: factor" in stderr
    assert "job 3: factor" in stderr


def test_every_command_has_a_short_summary_and_explained_options(capsys: pytest.CaptureFixture[str]) -> None:
    stdout = run(capsys, "--help")[1]
    assert "..." not in stdout.partition("Commands:")[2]
    assert len(stdout.partition("Commands:")[2].strip().splitlines()) >= len(METHODS) + 8
    assert "(default: 0)" in run(capsys, "safemerge", "--help")[1]
    batch = run(capsys, "batch", "--help")[1]
    assert "the jobs file" in batch
    assert "--no-json" not in batch
    assert "one line of JSON" in batch
    assert "--dtype" not in run(capsys, "score", "--help")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"safeshard {version('safeshard')}\n")


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("expected 3 dimensions"), False),
    ],
)
def test_out_of_memory_is_a_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, caught: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "verify", fail)
    if not caught:
        with pytest.raises(RuntimeError, match="3 dimensions"):
            main(["verify", "x"])
        return
    status, _, stderr = run(capsys, "verify", "x")
    assert status == 1
    assert "out of memory; use a smaller --memory or another --device" in stderr


def test_an_ascii_terminal_gets_replacements(world: Any, merge_args: list[object]) -> None:
    named = world.root / "sortie-é"
    merge_args[merge_args.index("--quiet")] = "--json"
    merge_args[merge_args.index(world.root / "out")] = named
    command = [sys.executable, "-m", "safeshard", *map(str, merge_args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "sortie-?" in done.stderr
    assert json.loads(done.stdout)[0]["output"] == str(named)
    assert (named / "manifest.json").exists()


def test_a_plan_takes_no_more_than_the_memory_allowed(
    capsys: pytest.CaptureFixture[str], merge_args: list[object]
) -> None:
    merge_args.remove("--quiet")
    status, stdout, _ = run(capsys, *merge_args, "--dry-run", "--memory", "18MB")
    assert status == 0
    assert "in flight take at most 18.00 MB" in stdout


def test_a_batch_says_what_was_finished_earlier(capsys: pytest.CaptureFixture[str], world: Any) -> None:
    """And gives figures of this run alone."""
    paths = world.trio()
    jobs = world.root / "jobs.yaml"
    entry = {"method": "scale", "aligned": str(paths["aligned"]), "adapter": str(paths["adapter"])}
    entries = [entry | {"factor": factor, "output": str(world.root / f"out-{factor}")} for factor in (0.25, 0.5)]
    for known in (entries[:1], entries, entries):
        jobs.write_text(json.dumps({"jobs": known}))
        status, out, _ = run(capsys, "batch", jobs)
        assert status == 0
        done = [line for line in out.splitlines() if line.endswith("(finished earlier)")]
        assert ("\nread " in out) == (len(done) < len(known))
    assert [line.split()[-3].rpartition("/")[2] for line in done] == ["out-0.25", "out-0.5"]


def test_an_offence_of_all_combinations_is_told_once(capsys: pytest.CaptureFixture[str], world: Any) -> None:
    jobs = world.root / "jobs.yaml"
    jobs.write_text("jobs: [{method: scale, matrix: {factor: [0.1, 0.2]}, nonsense: 1, aligned: a, output: o}]")
    status, _, err = run(capsys, "batch", jobs)
    assert status == 2
    assert err.count("nonsense") == 1


@pytest.mark.parametrize(
    ("command", "kept"),
    [("safemerge", True), ("batch", True), ("calibrate", True), ("score", False), ("verify", False)],
)
def test_an_interruption_says_whether_to_run_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, kept: bool
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(api, command, interrupted)
    places = ["out"] if command in ("batch", "verify") else ["--aligned", "a", "--unaligned", "u", "--output", "o"]
    if command == "calibrate":
        del places[2:4]
    status, _, err = run(capsys, command, *places)
    assert status == 1
    assert ("run the same command again" in err) == kept
    assert ("nothing was kept" in err) != kept


def test_functions_show_their_keywords() -> None:
    parameters = signature(streamer.safemerge).parameters
    assert {*SafeMerge.model_fields, *RunOptions.model_fields} == set(parameters)
    assert parameters["threshold"].default == 0.35
    assert parameters["threshold"].annotation is float
    assert parameters["aligned"].default is Parameter.empty
    assert next(iter(signature(streamer.batch).parameters)) == "jobs"
    assert signature(streamer.score).parameters["adapter"].default == ()


def test_a_stop_put_off_until_the_command_has_ended_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that arrives in a finalizer is raised again a little later, which may be too late."""
    reached = []

    class Signalled:
        def __del__(self) -> None:
            reached.append(True)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_with", lambda _: lambda **_: [Signalled()].clear())
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect"])
    assert not ended.value.code
    time.sleep(0.05)
    assert reached
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize("error", [RequestError(Offence("m", "a", "b")), OSError("x"), ImportError("half imported")])
def test_a_stop_that_a_library_swallowed_is_what_ended_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def swallows(**_: Any) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr(cli, "_with", lambda _: swallows)
    for _ in range(2):
        status, _, err = run(capsys, "ridge")
        assert status == 1
        assert err == "safeshard: interrupted by SIGINT; run the same command again to go on from here\n"


def test_a_stop_that_a_finalizer_drops_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Signalled:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work(**_: Any) -> None:
        [Signalled()].clear()
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setattr(cli, "_with", lambda _: work)
    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as ended:
        cli.main(["scale"])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed == "safeshard: interrupted by SIGTERM; run the same command again to go on from here\n"
    assert sys.unraisablehook is hook


def test_a_stop_that_takes_its_time_is_explained(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = []

    def work(**_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:  # a product that cannot be cut short
            for _ in range(1000):
                time.sleep(0.01)
                if text := capfd.readouterr().err:
                    said.append(text)
                    break

    monkeypatch.setattr(process, "PATIENCE", 0.01)
    monkeypatch.setattr(cli, "_with", lambda _: work)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(SystemExit):
        cli.main(["scale"])
    assert said == ["\nsafeshard: SIGINT came: what is at work ends first; once more ends it at once\n"]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


TWICE = {  # command: the option that is given twice
    "scale": "--adapter",
    "safedelta": "--calibration",
    "ridge": "--factors",
    "score": "--aligned",
    "calibrate": "--task-data",
    "report": "--output",
    "evaluate": "--suite",
    "bench io": "--folder",
}


@pytest.mark.parametrize("command", TWICE)
def test_a_place_given_twice_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    """The last would be taken, and nothing said of the first."""
    option = TWICE[command]
    others = ["--aligned", tmp_path, "--output", tmp_path / "out"] if command in METHODS else []
    status, _, stderr = run(capsys, *command.split(), *others, option, "one", f"{option}=two")
    assert status == 2
    assert f"{option}: expected one place, got 2 of them" in stderr
    assert ("`safeshard batch`" in stderr) == (command in METHODS)
    assert not (tmp_path / "out").exists()


def test_several_adapters_are_scored_whether_the_option_is_repeated_or_not(
    capsys: pytest.CaptureFixture[str], world: Any
) -> None:
    """`--adapter A B` and `--adapter A --adapter B`; only one place may be given of the others."""
    paths = world.trio()
    words = ["score", "--aligned", paths["aligned"], "--unaligned", paths["unaligned"], "--json"]
    two = [paths["adapter"], paths["safe_adapter"]]
    printed = [
        run(capsys, *words, *given) for given in (["--adapter", *two], ["--adapter", two[0], "--adapter", two[1]])
    ]
    assert [status for status, _, _ in printed] == [0, 0]
    assert printed[0][1] == printed[1][1]
    assert len(json.loads(printed[0][1])) == 2


@pytest.mark.parametrize("command", ["scale", "bench", "evaluate"])
@pytest.mark.parametrize("level", [["--log-level", "info"], ["--log-level=info"]])
def test_the_log_level_stands_before_or_after_any_command(
    capsys: pytest.CaptureFixture[str], level: list[str], command: str
) -> None:
    printed = [run(capsys, *words) for words in ([*level, command, "--help"], [command, *level, "--help"])]
    assert [status for status, _, _ in printed] == [0, 0]
    assert printed[0][1] == printed[1][1]
    assert f"Usage: safeshard {command}" in printed[0][1]


def test_more_layers_than_there_are_is_warned_about(capsys: pytest.CaptureFixture[str], world: Any) -> None:
    paths = world.trio()
    words = ["--aligned", paths["aligned"], "--unaligned", paths["unaligned"], "--adapter", paths["adapter"]]
    status, _, stderr = run(capsys, "safelora", *words, "--num-layers", "300", "--output", world.root / "out")
    assert status == 0
    assert "--num-layers 300" in stderr
