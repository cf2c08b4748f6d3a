"""The bench and the demo remove nothing that they did not make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from safeshard.bench import demo, pipeline, rows, safedelta
from safeshard.streamer.cli import main


def test_the_demo_removes_only_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--folder", str(tmp_path)])
    assert stop.value.code == 2
    assert "the demo did not make" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_demo_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo._claim(folder)
    (folder / "whole").mkdir()
    demo._claim(folder)
    assert (folder / "whole").is_dir()


@pytest.mark.parametrize("bench", ["pipeline", "safedelta"])
def test_measuring_leaves_other_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: str) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    commands: list[Sequence[str]] = []
    process = lambda command: commands.append(command) or (1.0, 1)  # noqa: E731
    monkeypatch.setattr(pipeline, "_process", process)
    folder = tmp_path / "models"
    (folder / "outputs").mkdir(parents=True)
    (folder / "outputs" / "thesis.txt").write_text("precious")
    if bench == "pipeline":
        pipeline.run(folder, "llama-tiny", 1, [1, 2], runs=1, cold=False, full=True)
    else:
        safedelta.run_jobs(folder, "llama-tiny", 1, [1, 2], runs=1)
    assert any("batch" in command for command in commands)
    assert (folder / "outputs" / "thesis.txt").read_text() == "precious"
    made = {"aligned", "unaligned", "safe", "adapter-0", "adapter-1", "outputs"}
    assert {path.name for path in folder.iterdir()} == made | (
        {"finetuned", "finetuned-safe"} if bench == "pipeline" else set()
    )


@pytest.mark.parametrize("text", ["a,b", "", "0", "1,,2", "-1"])
def test_numbers_are_read_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "pipeline", "--folder", str(tmp_path), "--shape", "llama-tiny", f"--adapters={text}"])
    assert stop.value.code == 2
    assert "--adapters: expected numbers such as 1,8,32" in capsys.readouterr().err
