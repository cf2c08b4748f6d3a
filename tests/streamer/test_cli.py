"""The command line as a user meets it: output, exit status, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeshard.streamer.cli import main


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


@pytest.mark.parametrize("command", ["safemerge", "safelora", "scale", "score", "batch", "inspect", "verify"])
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
