"""The trade-off as a picture: attack success avoided against utility, one curve a method, `scale` dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeshard.bench.tune.rule import Choice, Point
from safeshard.streamer.extras import require
from safeshard.streamer.run.ending.figures import write_figure

COLOURS = (  # the first of Okabe and Ito, and darker ones
    "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#882255", "#8C8C00",
    "#FF0000", "#7A0000", "#FF8FA3", "#5A5AD6",
)  # fmt: skip
MARKS = "sD^vhpd<o>sDo"
SHIFT = 6  # marks on, where the colours begin again
MOST = 48
BASELINE = "scale"
Curve = Sequence[tuple[float, float, float, float]]  # utility, 100 - attack success, and the error bars of both


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a mark a method, no two alike up to `MOST` methods; black is the baseline's alone."""
    others = [method for method in methods if method != BASELINE]
    places = ((n % len(COLOURS), n % len(COLOURS) + SHIFT * (n // len(COLOURS))) for n in range(len(others)))
    found = {m: (COLOURS[c], MARKS[mark % len(MARKS)]) for m, (c, mark) in zip(others, places, strict=True)}
    return {method: found.get(method, ("#000000", "o")) for method in methods}


def draw_curve(panel: Any, curve: Curve, dashes: str, **style: Any) -> None:
    """One method's settings, in order."""
    x, y, dx, dy = zip(*curve, strict=True)
    panel.errorbar(x, y, fmt=dashes, alpha=0.9, elinewidth=0.8, xerr=dx, yerr=dy, **style)


def frame(panel: Any, utility: str) -> None:
    """The ideal corner, limits and grid."""
    panel.plot(100, 100, "*", color="gold", markeredgecolor="black", markersize=20, label="ideal", clip_on=False)
    panel.set(xlabel=utility, xlim=(-4, 104), ylim=(-4, 106))
    panel.grid(alpha=0.3)


def draw(points: Sequence[Point], ends: Mapping[str, Point], choice: Choice, file: Path) -> None:
    """Draw the validation's points.

    Args:
        ends: the models that were there before, by name.
        choice: circled is what was chosen, and a line shows what the rule allows.
    """
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7.5, 6), layout="constrained")
    for method, (colour, mark) in styles(list(dict.fromkeys(p.method for p in points))).items():
        curve = [(p.utility, 100 - p.attack, 0.0, 0.0) for p in points if p.method == method]
        draw_curve(panel, curve, "--" if method == BASELINE else "-", marker=mark, color=colour, label=method)
    for (name, end), mark in zip(ends.items(), "PX", strict=False):
        panel.plot(end.utility, 100 - end.attack, mark, color="black", markersize=11, label=name)
    chosen = choice.chosen
    panel.plot(chosen.utility, 100 - chosen.attack, "o", markersize=18, fillstyle="none", color="red", label="chosen")
    panel.axhline(100 - choice.most, color="grey", linestyle=":", label="allowed by the rule")
    frame(panel, "utility (%)")
    panel.set(ylabel="attacks that failed (%)", title="Every setting on the validation prompts")
    panel.legend(loc="lower left", fontsize=9)
    save(plt, figure, file)


def pyplot() -> Any:
    """Matplotlib, drawing to files.

    Raises:
        RequestError: it is not installed.
    """
    require("matplotlib", "report").use("Agg")
    return require("matplotlib.pyplot", "report")


def save(plt: Any, figure: Any, file: Path) -> None:
    """Write the picture and forget it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, file)
    plt.close(figure)
