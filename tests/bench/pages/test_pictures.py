"""Pictures show the rows, all that belong, and are left out where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safeshard.bench import rows
from safeshard.bench.pages import pictures

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "environment", lambda: {"hardware": "a machine", "commit": "c"})
    return tmp_path


def job(number: int, adapters: int | str = 1, seconds: float = 4.0, floor: float = 2.0, **columns: Any) -> None:
    what = f"safemerge, {adapters} adapters" if adapters else "safemerge, full checkpoint"
    defaults = {
        "what": what, "shape": f"llama-1b x{number} layers", "cache": "warm", "layers": number, "adapters": adapters,
        "peak_rss_bytes": 5 * 10**8, "stages": {"read": 1.0, "compute": 3.0},
    }  # fmt: skip
    rows.record("pipeline", [seconds], nbytes=number * 10**8, floor=floor, **{**defaults, **columns})


def test_without_rows_there_is_no_picture(results: Path) -> None:
    job(2, layers="", what="a row from before layers were recorded")
    rows.record("kernels", [1.0], nbytes=10, what="copy")
    assert pictures.draw(results) == []
    assert not list(results.glob("*.png"))


def test_jobs_stand_beside_their_floor_and_their_stages() -> None:
    job(2)
    job(22, seconds=8.0)
    job(2, "", seconds=16.0, stages={"read": 1.0, "compute": 4.0, "write": 4.0, "hash": 1.0})
    left, right = pictures.jobs(rows.read("pipeline")).axes
    [times] = left.containers
    assert [bar.get_width() for bar in times] == [8.0, 4.0]  # of each job's deepest model alone, by size
    assert [text.get_text() for text in left.texts] == [" 8.0 times, 16 s", " 4.0 times, 8 s"]
    stages = {bars.get_label(): [bar.get_width() for bar in bars] for bars in right.containers}
    # Writing is within computing, and hashing within writing.
    assert stages == {"read": [20, 25], "compute": [0, 75], "write": [60, 0], "hash": [20, 0]}
    assert [[bar.get_x() for bar in bars] for bars in right.containers] == [[0, 0], [20, 25], [20, 100], [80, 100]]


def test_memory_is_drawn_against_layers_and_adapters() -> None:
    for layers in (11, 2, 22):
        job(layers)
    job(22, 8, peak_rss_bytes=7 * 10**8)
    job(22, 8, cache="cold")  # the higher peak is shown
    layers, adapters = pictures.memory(rows.read("pipeline")).axes
    peak, moved = layers.lines
    assert [*peak.get_xdata()] == [*moved.get_xdata()] == [2, 11, 22]
    assert [*peak.get_ydata()] == [0.5, 0.5, 0.5]
    assert [*moved.get_ydata()] == pytest.approx([0.2, 1.1, 2.2])
    assert [*adapters.lines[0].get_xdata()] == [1, 8]
    assert [*adapters.lines[0].get_ydata()] == [0.5, 0.7]


def test_repeated_layers_are_a_model_of_their_own() -> None:
    for shape in ("llama-70b x80 layers, 2 real", "llama-70b x2 layers"):
        job(80 if "real" in shape else 2, shape=shape)
    job(2, 8, shape="llama-70b x2 layers, 2 real")
    layers, adapters = pictures.memory(rows.read("pipeline")).axes
    assert [line.get_label() for line in layers.lines[::2]] == [
        "llama-70b: peak memory", "llama-70b, 2 real: peak memory",
    ]  # fmt: skip
    assert [[*line.get_xdata()] for line in adapters.lines[::2]] == [[1], [1]]
    job(2, shape="llama-70b x2 layers, 2 real")
    _, adapters = pictures.memory(rows.read("pipeline")).axes
    own = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in adapters.lines}
    assert own["llama-70b, 2 real: read and written"] == [(1, 0.2), (8, 0.2)]  # not 80 layers beside 2


def test_kernels_lie_under_the_roof_of_their_machine(results: Path) -> None:
    rows.record("kernels", [1.0], nbytes=10 * 10**9, what="copy")
    rows.record("kernels", [1.0], operations=10**12, what="square product", dtype="fp32")
    for backend, seconds in (("torch", 2.0), ("published", 8.0)):
        columns = {"what": "gate", "backend": backend, "ceiling": "copy and matrix rate", "shape": "8 x 8"}
        rows.record("kernels", [seconds], nbytes=10**9, operations=4 * 10**9, floor=0.1, **columns)
    [panel] = pictures.roofline(rows.read("kernels")).axes
    roof, *points = panel.lines
    for x, y in roof.get_xydata():
        assert y == pytest.approx(min(10 * 10**9 * x, 10**12) / 1e12)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in points if len(line.get_xdata())}
    assert drawn == {"gate, torch": [[4.0, 0.002]], "gate, published": [[4.0, 0.0005]]}
    [file] = pictures.draw(results)
    assert file == results / "roofline.png"
    assert file.read_bytes().startswith(PNG)
