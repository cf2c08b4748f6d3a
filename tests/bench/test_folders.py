"""The bench and the demo remove nothing that they did not make."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeshard.bench import demo, pipeline, rows
from safeshard.streamer.cli.app import main


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


def test_measuring_leaves_other_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    folder = tmp_path / "models"
    (folder / "outputs").mkdir(parents=True)
    (folder / "outputs" / "thesis.txt").write_text("precious")
    pipeline.run(folder, "llama-tiny", [2], 1, [1, 2], ["safemerge", "scale-full"], runs=1, cold=True, memory="1GiB")
    made = [row for row in rows.read("pipeline") if row["stages"]]
    assert all(float(row["stages"].split("processor=")[1].split()[0]) > 0.1 for row in made)
    assert [(row["what"], row["layers"], row["adapters"]) for row in made] == [
        ("safemerge, 1 adapter", "2", "1"), ("safemerge, 2 adapters", "2", "2"), ("scale, full checkpoint", "2", ""),
    ]  # fmt: skip
    assert all(row["share_of_ceiling"] and row["bytes"] and row["peak_rss_bytes"] for row in made)
    assert {row["shape"] for row in made} == {"llama-tiny x2 layers, 1 real"}
    assert (folder / "outputs" / "thesis.txt").read_text() == "precious"
    assert not list(folder.glob("bench-*"))


@pytest.mark.parametrize("text", ["a,b", "", "0", "1,,2", "-1"])
def test_numbers_are_read_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "pipeline", "--folder", str(tmp_path), "--shape", "llama-tiny", f"--adapters={text}"])
    assert stop.value.code == 2
    assert "--adapters: expected numbers such as 1,8,32" in capsys.readouterr().err
