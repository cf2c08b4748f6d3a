"""Tables and bars for terminals: aligned text, colours only where asked, names never markup or escape sequences."""

from __future__ import annotations

import io
import re

import pytest

from safeshard.manifests.terminal import BAR, Painted, Span, grid, has_colour, layer_bars

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_columns_are_aligned() -> None:
    text = grid(["module", "a", "bb"], [["x", "1", "22.5"], ["longer", "333", "4"]])
    assert text.splitlines() == ["module    a    bb", "x         1  22.5", "longer  333     4"]
    assert grid([], [["a", "b"], ["cc", "d"]], left=2).splitlines() == ["a   b", "cc  d"]


def test_colours_are_only_colours() -> None:
    rows = [["x", Painted("1", "yellow"), Span(0.25, 0.75, "red")]]
    plain, coloured = grid(["a", "b", "c"], rows), grid(["a", "b", "c"], rows, color=True)
    assert "\x1b" not in plain
    assert "\x1b[33m" in coloured
    assert [line.rstrip() for line in ANSI.sub("", coloured).splitlines()] == plain.splitlines()


def test_names_are_no_markup_and_no_escapes() -> None:
    text = grid(["[bold]a[/bold]"], [["[red]x[/red]"], ["\x1b[2J\u202e"], [":smile:"]])
    assert text.splitlines() == ["[bold]a[/bold]", "[red]x[/red]", r"\x1b[2J\u202e", ":smile:"]


def test_a_wide_table_is_never_wrapped() -> None:
    assert len(grid(["a" * 300, "b" * 300], [["c", "d"]]).splitlines()) == 2


def test_bars_follow_the_values() -> None:
    lines = layer_bars({"0": [0.0, 0.5, 0.25], "1": [0.5, 1.0], "other": [1.0]}, "cosine").splitlines()
    assert lines[0].split() == ["layer", "lowest", "median", "highest", "cosine", "0.0000", "to", "1.0000"]
    assert lines[1].split()[:4] == ["0", "0.0000", "0.2500", "0.5000"]
    assert [line.count("█") for line in lines[1:3]] == [BAR // 2, BAR // 2]
    assert lines[2].index("█") == lines[1].index("█") + BAR // 2
    assert layer_bars({}, "cosine") == "no cosine is known"
    assert "1.0000" in layer_bars({"0": [1.0]}, "leak")


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False), (False, {}, False)],
)
def test_who_gets_colours(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], expected: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    assert has_colour(Stream()) is expected
