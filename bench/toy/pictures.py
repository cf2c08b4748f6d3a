"""Two pictures: safety against utility with one curve a method, and the gate's cosines by layer and module."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeshard.bench.toy.table import Line, Row, lines
from safeshard.streamer.extras import require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKS = "osD^vP*"
TITLES = {"dirty-full": "Full fine-tune", "dirty-lora": "LoRA fine-tune"}


def draw_tradeoff(rows: Sequence[Row], file: Path) -> None:
    """Draw the test figures of every setting on both dirty fine-tunes: task against harmful answers avoided."""
    plt = _pyplot()
    test = lines(rows, "test")
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.6), sharex=True, sharey=True, layout="constrained")
    for panel, (model, title) in zip(panels, TITLES.items(), strict=True):
        curves: dict[str, list[Line]] = {}
        for key, line in test.items():
            if key[0] == model and key[1] != "fine-tuned":
                curves.setdefault(key[1], []).append(line)
        for (method, points), colour, mark in zip(curves.items(), COLOURS, MARKS, strict=False):
            style = "--" if method == "scale" else "-"
            panel.plot([p.mean("task") for p in points], [100 - p.mean("harm") for p in points], style, marker=mark,
                       color=colour, label=method, alpha=0.85)  # fmt: skip
        tuned = test[model, "fine-tuned", ""]
        panel.plot(tuned.mean("task"), 100 - tuned.mean("harm"), "X", color="black", markersize=11, label="fine-tuned")
        panel.set(title=title, xlabel="task accuracy (%)", xlim=(-3, 103), ylim=(-3, 108))
        panel.text(101, 103, "ideal", ha="right", weight="bold")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right", bbox_to_anchor=(1, 0.9), fontsize=9)
    panels[0].set_ylabel("forbidden requests not answered harmfully (%)")
    figure.suptitle("Safety kept against task learned: every setting on the test split, mean over seeds")
    _save(plt, figure, file)


def draw_cosines(scores: Path, file: Path) -> None:
    """Draw a heat map of one model's cosines from the CSV file that `score` wrote."""
    plt = _pyplot()
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
    figure.colorbar(image)
    _save(plt, figure, file)


def _pyplot() -> Any:
    require("matplotlib", "report").use("Agg")
    return require("matplotlib.pyplot", "report")


def _save(plt: Any, figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
