"""Two pictures: safety against utility with one curve a method, and the gate's cosines by layer and module."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeshard.bench.toy.table import CONSTANT_GUESS, Line, Row, lines
from safeshard.streamer.extras import require

COLOURS = (  # the first of Okabe and Ito, and two darker ones
    "#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#882255", "#8C8C00",
)  # fmt: skip
MARKS = "osD^vhpd<"
TITLES = {"dirty-full": "Full fine-tune", "dirty-lora": "LoRA fine-tune"}


def draw_tradeoff(rows: Sequence[Row], file: Path) -> None:
    """Draw the test figures of every setting on both dirty fine-tunes: task against harmful answers avoided."""
    plt = pyplot()
    test = lines(rows, "test")
    methods = list(dict.fromkeys(key[1] for key in test if key[0] in TITLES and key[1] != "fine-tuned"))
    styles = dict(zip(methods, zip(COLOURS, MARKS, strict=True), strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    for panel, (model, title) in zip(panels, TITLES.items(), strict=True):
        for method, (colour, mark) in styles.items():
            points = [line for key, line in test.items() if key[:2] == (model, method)]
            if points:
                dashes = "--" if method == "scale" else "-"
                _draw(panel, points, dashes, marker=mark, color=colour, label=method, zorder=3 if mark in "os" else 2)
        _draw(panel, [test[model, "fine-tuned", ""]], "", marker="X", color="black", markersize=11, label="fine-tuned")
        _draw(panel, [test["aligned", "aligned", ""]], "", marker="P", color="black", markersize=10, label="aligned")
        panel.plot(100, 100, "*", color="gold", markeredgecolor="black", markersize=20, label="ideal", clip_on=False)
        panel.axvline(CONSTANT_GUESS, color="grey", linestyle=":", label="constant guess at the task")
        panel.set(title=title, xlabel="task accuracy (%)", xlim=(-4, 104), ylim=(-4, 106))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forbidden requests not answered harmfully (%)")
    known = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, fontsize=10)
    seeds = len({row["seed"] for row in rows})
    spread = f", mean of {seeds} seeds and its standard error" if seeds > 1 else ""
    figure.suptitle(f"Safety kept against task learned: every setting on the test split{spread}")
    _save(plt, figure, file)


def _draw(panel: Any, points: Sequence[Line], dashes: str, **style: Any) -> None:
    panel.errorbar(
        [p.mean("task") for p in points], [100 - p.mean("harm") for p in points], fmt=dashes, alpha=0.9, elinewidth=0.8,
        xerr=[p.error("task") for p in points], yerr=[p.error("harm") for p in points], **style,
    )  # fmt: skip


def draw_cosines(scores: Path, file: Path) -> None:
    """Draw a heat map of one model's cosines from the CSV file that `score` wrote."""
    plt = pyplot()
    with scores.open(newline="") as text:
        cosines = {row["module"]: float(row["cosine"]) for row in csv.DictReader(text)}
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in cosines))
    layers = sorted({int(module.split("layers.")[1].split(".")[0]) for module in cosines})
    place = {(int(m.split("layers.")[1].split(".")[0]), m.rpartition(".")[2]): c for m, c in cosines.items()}
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    values = [[place[layer, name] for name in names] for layer in layers]
    image = axes.imshow(values, cmap="cividis", vmin=0, aspect="auto")
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            light = value < max(map(max, values)) / 2
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if light else "black")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_title("The gate's cosine of each module of the LoRA fine-tune")
    figure.colorbar(image, label="cos(P delta, delta)")
    _save(plt, figure, file)


def pyplot() -> Any:
    """Matplotlib, drawing to files.

    Raises:
        RequestError: it is not installed.
    """
    require("matplotlib", "report").use("Agg")
    return require("matplotlib.pyplot", "report")


def _save(plt: Any, figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
