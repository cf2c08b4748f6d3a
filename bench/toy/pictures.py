"""Two pictures: safety against utility with one curve a method, and the gate's cosines by layer and module."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeshard.bench.toy.table import CONSTANT_GUESS, Line, Row, lines
from safeshard.bench.tune.picture import BASELINE, draw_curve, frame, pyplot, save
from safeshard.bench.tune.picture import styles as styles_of

TITLES = {"dirty-full": "Full fine-tune", "dirty-lora": "LoRA fine-tune"}


def draw_tradeoff(rows: Sequence[Row], file: Path) -> None:
    """Draw the test figures of every setting on both dirty fine-tunes: task against harmful answers avoided."""
    plt = pyplot()
    test = lines(rows, "test")
    methods = list(dict.fromkeys(key[1] for key in test if key[0] in TITLES and key[1] != "fine-tuned"))
    styles = styles_of(methods)
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    for panel, (model, title) in zip(panels, TITLES.items(), strict=True):
        for method, (colour, mark) in styles.items():
            points = [line for key, line in test.items() if key[:2] == (model, method)]
            if points:
                dashes = "--" if method == BASELINE else "-"
                _draw(panel, points, dashes, marker=mark, color=colour, label=method, zorder=3 if mark in "os" else 2)
        _draw(panel, [test[model, "fine-tuned", ""]], "", marker="X", color="black", markersize=11, label="fine-tuned")
        _draw(panel, [test["aligned", "aligned", ""]], "", marker="P", color="black", markersize=10, label="aligned")
        frame(panel, "task accuracy (%)")
        panel.axvline(CONSTANT_GUESS, color="grey", linestyle=":", label="constant guess at the task")
        panel.set(title=title)
    panels[0].set_ylabel("forbidden requests not answered harmfully (%)")
    known = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, fontsize=10)
    seeds = len({row["seed"] for row in rows})
    spread = f", mean of {seeds} seeds and its standard error" if seeds > 1 else ""
    figure.suptitle(f"Safety kept against task learned: every setting on the test split{spread}")
    save(plt, figure, file)


def _draw(panel: Any, points: Sequence[Line], dashes: str, **style: Any) -> None:
    curve = [(p.mean("task"), 100 - p.mean("harm"), p.error("task"), p.error("harm")) for p in points]
    draw_curve(panel, curve, dashes, **style)


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
    save(plt, figure, file)
