"""The static roofline of a card, and what `bench kernels` prints and writes where there is a card."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from safeshard.bench import kernels, rows
from safeshard.bench.cli import app
from safeshard.bench.machine import roofline

README = Path(__file__).parents[2] / "bench" / "README.md"


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_card_is_found_by_the_name_its_driver_gives(device: str, card: str) -> None:
    found = roofline.find(device)
    assert found is not None
    assert found.name == card


def test_an_unknown_card_has_no_roofline() -> None:
    assert roofline.find("NVIDIA GeForce GT 710") is None


def test_bounds_by_hand() -> None:
    card = roofline.Card("card", memory=1e12, bf16=1e15, tf32=5e14, fp32=1e14)
    one = roofline.bound(card, "gate", 1000, 2000, 16, 0)
    # Two weights of 2e6 values of 2 bytes, read twice, and 16 columns of fp32 by rows and by columns, there and back.
    assert one is not None
    assert one.memory == pytest.approx((16e6 + 16 * 4 * 2 * 3000) / 1e12)
    # Two products of 2e6 x 16, each of two operations, as three TF32 products.
    assert one.matrix == pytest.approx(3 * 2 * 2 * 2e6 * 16 / 5e14)
    assert (one.by, one.share) == ("memory", 0.8)
    many = roofline.bound(card, "gate", 1000, 2000, 16 * 64, 0)
    assert many is not None
    assert (many.by, many.share) == ("matrix", 0.6)
    assert many.seconds == many.matrix == pytest.approx(64 * one.matrix)
    gram = roofline.bound(card, "gram", 0, 2000, 0, 4096)
    assert gram is not None
    assert gram.matrix == pytest.approx(4096 * 2000 * 2000 / 1e15)
    assert roofline.bound(card, "factor", 1000, 2000, 0, 0) is None


def test_the_readme_shows_what_is_printed() -> None:
    result = CliRunner().invoke(app, ["kernels", "--card", "H100"])
    assert result.exit_code == 0, result.output
    shown = [line for line in README.read_text().splitlines() if ": at best " in line]
    assert len(shown) == 4
    assert set(shown) <= set(result.output.splitlines())


def test_a_card_that_is_not_known_is_refused() -> None:
    result = CliRunner().invoke(app, ["kernels", "--card", "Voodoo 2"])
    assert result.exit_code != 0
    assert "H100" in result.output


def test_on_a_gpu_all_goes_to_one_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timings are a CPU's: there is no GPU here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "RESULTS", rows.DEFAULT_RESULTS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    asked: list[tuple[object, ...]] = []

    def run(*args: object) -> list[str]:
        asked.append(args)
        rows.append(str(args[-1]), {"what": "gate"})
        return []

    monkeypatch.setattr(kernels, "run", run)
    result = CliRunner().invoke(app, ["kernels", "--device", "cuda:0"])
    assert result.exit_code == 0, result.output
    assert asked == [
        (list(kernels.OPERATIONS), "llama-70b", [16], [1, 16, 64], "cuda:0", 1.0, "kernels-nvidia-h100-80gb-hbm3")
    ]
    (file,) = tmp_path.glob("*.csv")
    assert next(iter(csv.DictReader(file.open())))["what"] == "gate"
    assert "send this file" in result.output
    assert file.name in result.output.replace("\n", "")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = CliRunner().invoke(app, ["kernels", "--device", "cuda:2"])
    assert result.exit_code == 2
    assert "sees 2 of them" in result.output


@pytest.fixture
def a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of 1e12 bytes and operations a second, on which each run takes a millisecond and nothing is computed."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(kernels, "_ceilings", lambda *_: None)
    monkeypatch.setattr(kernels, "_free", lambda _: 1 << 40)
    monkeypatch.setattr(kernels, "backends", lambda *_: {"triton": lambda: None})
    ceiling = type("Ceiling", (), {"rate": 1e12})
    monkeypatch.setattr(kernels, "copying", lambda _: ceiling)
    monkeypatch.setattr(kernels, "multiplying", lambda *_: ceiling)
    monkeypatch.setattr(kernels, "timings", lambda *_: [0.001])
    return monkeypatch


def test_measured_times_stand_beside_the_roofline(
    a_card: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.run(["gate"], "llama-70b", [16], [1], "cuda:0", 1.0) == []
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "data sheet" in line]
    assert len(lines) == 4
    assert "at best 0.562 ms (memory); 56% of it, 80% wanted" in lines[-1]
    # 4 x 28672 x 8192 bytes and as many operations a rank, of a machine that does 1e12 of either
    assert "GB/s, 15032.4 GFLOP/s, 1503% of copy and matrix rate" in printed
    a_card.setattr(torch.cuda, "get_device_name", lambda *_: "Voodoo 2")
    kernels.run(["gate"], "llama-70b", [16], [1], "cuda:0", 1.0)
    assert "Voodoo 2: its data sheet is not known here" in capsys.readouterr().out


def test_what_fails_on_a_card_is_said_and_the_rest_is_measured(a_card: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_card.chdir(tmp_path)
    runs: list[object] = []

    def timings(function: object, device: str) -> list[float]:
        runs.append(function)
        if len(runs) == 2:
            raise RuntimeError("out of shared memory")
        return [0.001]

    a_card.setattr(kernels, "timings", timings)
    result = CliRunner().invoke(app, ["kernels", "--device", "cuda:0", "--operations", "gate", "--adapters", "1"])
    assert result.exit_code == 1
    assert "gate 8192 x 8192, 1 of rank 16, triton: failed: RuntimeError: out of shared memory" in result.output
    assert "1 failed" in result.output
    (file,) = tmp_path.glob("*.csv")
    assert [row["shape"] for row in csv.DictReader(file.open())] == ["1024 x 8192", "8192 x 28672", "28672 x 8192"]
