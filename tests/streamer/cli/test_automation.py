"""What scripts rely on: JSON alone on stdout, batches that keep going, progress without a terminal."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safeshard.streamer import progress, score
from safeshard.streamer.cli.app import main
from safeshard.streamer.methods.safemerge import SafeMerge
from safeshard.streamer.progress import Progress, duration


@pytest.fixture
def trio(world: Any) -> dict[str, Path]:
    paths: dict[str, Path] = world.trio()
    return paths


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        return stop.value.code if isinstance(stop.value.code, int) else 0, *capsys.readouterr()

    return command


def words(trio: dict[str, Path], *roles: str) -> list[object]:
    return [word for role in roles for word in (f"--{role.replace('_', '-')}", trio[role])]


GATE = ("aligned", "unaligned", "adapter")


def test_json_is_alone_on_stdout_for_every_command(run: Any, world: Any, trio: dict[str, Path]) -> None:
    out, jobs = world.root / "out", world.root / "jobs.yaml"
    lora = ["safelora", *words(trio, *GATE), "--num-layers", "3", "--output", out]
    entry = {"method": "scale", "aligned": str(trio["aligned"]), "adapter": str(trio["adapter"]), "factor": 0.5}
    jobs.write_text(json.dumps({"jobs": [entry | {"output": str(world.root / "batch")}]}))
    commands = [
        [*lora, "--dry-run"], lora, ["inspect", out], ["verify", out], ["report", out], ["batch", jobs],
        ["score", *words(trio, *GATE), "--suggest"], ["safelora", "--threshold", "x"], ["nonsense"],
        ["inspect", world.root], lora, ["verify", world.root / "none"], ["batch", world.root / "none.yaml"],
        ["calibrate", "--aligned", world.root / "none", "--output", world.root / "factors"],
        ["--log-level", "loud", "inspect", out],
    ]  # fmt: skip
    failed = []
    for argv in commands:
        status, stdout, stderr = run(*argv, "--json")
        assert stdout.count("\n") == 1, argv
        value = json.loads(stdout)
        if status:
            failed.append(argv)
            assert value["error"]["exit_status"] == status == 2, argv
            assert value["error"]["message"], argv
            assert stderr, argv
    assert failed == commands[7:]


def test_json_names_each_problem(run: Any, world: Any, trio: dict[str, Path]) -> None:
    argv = ["scale", "--aligned", "a", "--adapter", "x", "--output", "o", "--factor", "1", "--device", "gpu", "--json"]
    [problem] = json.loads(run(*argv)[1])["error"]["problems"]
    assert problem == {"where": "--device", "expected": "auto, cpu, cuda or cuda:N", "got": "'gpu'"}


def test_inspect_gives_the_manifest(run: Any, world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    run("safelora", *words(trio, *GATE), "--num-layers", "3", "--output", out, "--quiet")
    assert json.loads(run("inspect", out, "--json")[1]) == json.loads((out / "manifest.json").read_text())


def test_a_batch_keeps_going(run: Any, world: Any, trio: dict[str, Path]) -> None:
    """Past an adapter of another model, one that is not there, and one with NaN, which shows underway alone."""
    root = world.root
    wide = world.adapter("wide", world.llama(), rank=4)
    world.edit_config(wide, r=8)
    tensors = load_file(trio["adapter"] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    broken = world.adapter("broken", {}, tensors=tensors | {name: torch.full_like(tensors[name], math.nan)})
    shutil.copytree(trio["adapter"], root / "other")
    adapters = {"good": trio["adapter"], "wide": wide, "none": root / "none", "broken": broken, "last": root / "other"}
    jobs = root / "jobs.yaml"
    entries = [
        {"method": "scale", "aligned": str(trio["aligned"]), "adapter": str(adapter), "factor": 0.5,
         "output": str(root / "out" / name)}
        for name, adapter in adapters.items()
    ]  # fmt: skip
    jobs.write_text(json.dumps({"jobs": entries}))
    assert run("batch", jobs, "--quiet")[0] == 2
    assert not (root / "out").exists()
    status, stdout, stderr = run("batch", jobs, "--quiet", "--keep-going", "--json")
    assert status == 1
    assert {p.name for p in (root / "out").iterdir() if not p.name.endswith(".partial")} == {"good", "last"}
    assert "3 of 5 jobs failed" in stderr
    outcomes = {Path(o["output"]).name: o for o in json.loads(stdout)}
    assert outcomes.keys() == adapters.keys()
    assert "NaN" in outcomes["broken"]["error"]
    assert "no such folder" in outcomes["none"]["error"]
    assert "rank of A and B in every module, got 8" in outcomes["wide"]["error"]
    status, _, _ = run(
        "scale", *words(trio, "aligned", "adapter"), "--factor", "0.5", "--output", root / "one", "--quiet"
    )
    assert status == 0
    file = "adapter_model.safetensors"
    assert (root / "out/good" / file).read_bytes() == (root / "one" / file).read_bytes()


def test_an_offence_of_a_shared_input_is_told_for_each_job(run: Any, world: Any, trio: dict[str, Path]) -> None:
    jobs = world.root / "jobs.yaml"
    entry = {"method": "scale", "aligned": str(world.root / "none"), "adapter": str(trio["adapter"]), "factor": 0.5}
    jobs.write_text(json.dumps({"jobs": [entry | {"output": str(world.root / f"out{i}")} for i in range(2)]}))
    outcomes = json.loads(run("batch", jobs, "--keep-going", "--json")[1])
    assert ["no such folder" in o["error"] for o in outcomes] == [True, True]
    assert run("batch", jobs)[2].count("no such folder") == 1


def test_weights_with_a_comma(run: Any, world: Any, trio: dict[str, Path]) -> None:
    for number, form in enumerate((["0.6,0.4"], ["0.6", "0.4"], "=0.6,0.4")):
        option = ["--weights", *form] if isinstance(form, list) else [f"--weights{form}"]
        out = world.root / f"out{number}"
        assert run("safemerge", *words(trio, *trio), *option, "--output", out, "--quiet")[0] == 0
        assert json.loads((out / "manifest.json").read_text())["method"]["options"]["weights"] == [0.6, 0.4]
    places = dict.fromkeys(trio, "x") | {"output": "o"}
    assert SafeMerge(**places, weights="0.6, 0.4").weights == (0.6, 0.4)
    assert run("safemerge", *words(trio, *trio), "--weights", "0.6,x", "--output", world.root / "no")[0] == 2


def test_score_ends_with_a_summary(run: Any, world: Any, trio: dict[str, Path]) -> None:
    [result] = score(**{role: trio[role] for role in GATE}, quiet=True)
    known = sorted(c for c in result.cosines.values() if c is not None)
    status, stdout, _ = run("score", *words(trio, *GATE), "--suggest")
    assert status == 0
    figures = {line.split()[0]: line.split()[1:] for line in stdout.splitlines() if line}
    middle = (known[6] + known[7]) / 2
    for name, value in (("lowest", known[0]), ("median", middle), ("highest", known[-1])):
        assert figures[name] == [f"{value:.4f}"]
    counts = {float(k): int(v[0]) for k, v in figures.items() if re.fullmatch(r"0\.\d+|1", k)}
    assert counts == {t: sum(c < t for c in known) for t in counts}
    assert min(counts.values()) >= 1
    assert max(counts.values()) == 14
    suggested = re.search(r"--threshold (\S+) changes (\d+) of 14 modules", stdout)
    assert suggested
    assert sum(c < float(suggested[1]) for c in known) == int(suggested[2]) <= 7


def test_lines_at_intervals_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(1_000_000, quiet=False) as bar:
        for layer in range(10):
            now[0] += 20.0
            bar.done(f"model.layers.{layer}.mlp", 100_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "safeshard: 20% (200.00 kB of 1.00 MB), layer 1, 0:40 so far, 2:40 left"
    with Progress(10, quiet=True, unit="module") as bar:
        now[0] += 100
        bar.done("x", 1)
    assert capsys.readouterr().err == ""
    assert [duration(s) for s in (5, 75, 3725)] == ["0:05", "1:15", "1:02:05"]


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "model", "--output", "out", "--suite"], ["batch"], ["finish"], ["tune"], ["scale"], ["nonsense"],
        ["report", "out", "--evaluation"], ["report", "out", "--output"], ["batch", "none.yaml", "--part"],
        ["scale", "--factor"], ["batch", "none.yaml", "--parts"], ["inspect", "out", "--log-level"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_a_place_where_none_belongs_keeps_its_secrets(run: Any, argv: list[str], json_too: list[str]) -> None:
    """Paths made of a URL have lost a slash; the parser of the command line repeats the words."""
    status, out, err = run(*argv, "https://user:hunter2@host/x?token=hunter2", *json_too)
    assert status == 2
    assert "hunter2" not in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [["demo", "--small"], ["demo"], ["bench", "toy"], ["bench", "make-models"]])
def test_models_of_measurements_are_made_on_this_machine(
    run: Any, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder `s3:` comes of it."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*argv, "--folder", "s3://key:hunter2@bucket/x")
    assert status == 2
    assert "--folder: expected a local folder: write it there, then copy it" in err
    assert "hunter2" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_documentation_may_be_stripped(tmp_path: Path) -> None:
    """As `python -OO` does, and PYTHONOPTIMIZE=2."""
    command = [sys.executable, "-OO", "-m", "safeshard", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_log_level_stands_anywhere(run: Any, world: Any, trio: dict[str, Path]) -> None:
    out = world.root / "out"
    argv = ["safelora", *words(trio, *GATE), "--num-layers", "3", "--output", out, "--quiet"]
    assert run(*argv, "--log-level", "error")[0] == 0
    assert run("--log-level=info", "inspect", out)[0] == 0
    status, _, err = run("inspect", out, "--log-level", "loud")
    assert status == 2
    assert "--log-level: expected one of debug, info, warning, error, got loud" in err
