"""`--plot`: bars on the terminal, or a picture for a paper."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from safeshard.manifests import RequestError
from safeshard.streamer import inspect, scale, score
from safeshard.streamer.cli.app import main
from safeshard.streamer.run.ending.figures import draw_values


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def gate(world: Any) -> list[object]:
    trio = world.trio(layers=3)
    return ["--aligned", trio["aligned"], "--unaligned", trio["unaligned"], "--adapter", trio["adapter"]]


def test_scores_on_the_terminal(capsys: pytest.CaptureFixture[str], gate: list[object]) -> None:
    for place in ([*gate, "--plot"], ["--plot", *gate]):
        status, out, _ = run(capsys, "score", *place, "--quiet")
        assert status == 0
        rows = [line.split() for line in out.splitlines() if line.strip()]
        assert rows[0] == ["adapter"]
        assert [row[0] for row in rows[1:]] == ["layer", "0", "1", "2"]
        assert all(float(low) <= float(middle) <= float(high) for _, low, middle, high, *_ in rows[2:])


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_scores_as_a_picture(capsys: pytest.CaptureFixture[str], gate: list[object], world: Any, suffix: str) -> None:
    file = world.root / f"pictures/scores.{suffix}"
    status, out, _ = run(capsys, "score", *gate, world.root / "safe", "--plot", file)
    assert status == 0
    assert "median" in out
    first = file.read_bytes()
    if suffix == "svg":
        texts = {element.text for element in ET.fromstring(first).iter("{http://www.w3.org/2000/svg}text")}
        assert {"cosine", "layer", "modules"} <= texts
        assert len([text for text in texts if text and text.endswith(("adapter", "safe"))]) == 2
    else:
        assert first[:4] == b"\x89PNG"
    assert run(capsys, "score", *gate, "--plot", file)[0] == 2  # it exists
    assert run(capsys, "score", *gate, world.root / "safe", "--plot", file, "--overwrite")[0] == 0
    assert file.read_bytes() == first  # the same bytes whenever it is drawn


def test_an_output_as_bars_and_as_a_picture(capsys: pytest.CaptureFixture[str], world: Any) -> None:
    trio, out = world.trio(), world.root / "out"
    scale(aligned=trio["aligned"], adapter=trio["adapter"], factor=0.5, output=out, quiet=True)
    plain = inspect(out)
    assert run(capsys, "inspect", out)[1] == plain + "\n"
    assert run(capsys, "inspect", out, "--plot")[1].startswith(plain)
    assert inspect(out, plot=world.root / "out.svg") == plain
    assert (world.root / "out.svg").read_bytes()[:5] == b"<?xml"


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    names = [r"$\frac{", "a$b$", "\x1b[2J"]
    draw_values({name: {"layers.0.q": 0.5} for name in names}, "cosine", tmp_path / "x.svg")
    texts = {element.text for element in ET.parse(tmp_path / "x.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {r"$\frac{", "a$b$", r"\x1b[2J"} <= texts


@pytest.mark.parametrize(
    "values", [(0.5, 0.5 + 1e-16), (0.5, 0.5), (1.0, 1.0 + 2e-16), (0.0, 5e-324), (1e308,), (-1e308, 1e308), ()]
)
def test_values_too_close_to_each_other_or_too_far(tmp_path: Path, values: tuple[float, ...]) -> None:
    """As outputs have them whose modules all keep the same share, but for the last digit."""
    draw_values({"m": dict(zip(map(name_of, range(2)), values, strict=False))}, "x", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 5000


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


def test_what_it_refuses(world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"aligned": "none", "unaligned": "none", "adapter": "none"}
    with pytest.raises(RequestError, match=r"--plot.*a \.svg or \.png or \.pdf file, got \.jpg"):
        score(**given, plot=tmp_path / "x.jpg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"matplotlib.*safeshard\[report\]"):
        score(**given, plot=tmp_path / "x.svg")
