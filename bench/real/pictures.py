"""The trade-off of every setting on the real model, both fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safeshard.bench.real.table import Row, curves
from safeshard.bench.tune.picture import BASELINE, draw_curve, frame, pyplot, save, styles

TITLES = {"task-lora": "LoRA fine-tune", "task-full": "Full fine-tune"}
ENDS = {"aligned": "P", "fine-tuned": "X"}


def draw_tradeoff(rows: Sequence[Row], file: Path) -> None:
    """Draw validation's means over seeds: task against attacks that failed."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    found = {model: curves(rows, model) for model in TITLES}
    methods = [m for m in dict.fromkeys(m for curve in found.values() for m in curve) if m not in ENDS]
    for panel, (model, title) in zip(panels, TITLES.items(), strict=True):
        for method, (colour, mark) in styles(methods).items():
            if points := [(task, 100 - attack, 0.0, 0.0) for task, attack in found[model].get(method, [])]:
                draw_curve(panel, points, "--" if method == BASELINE else "-", marker=mark, color=colour, label=method)
        for name, mark in ENDS.items():
            for task, attack in found[model].get(name, []):
                panel.plot(task, 100 - attack, mark, color="black", markersize=11, label=name)
        frame(panel, "task (%)")
        panel.set(title=title)
    panels[0].set_ylabel("forbidden requests refused (%)")
    handles = {lab: h for p in panels for h, lab in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"SmolLM2-135M: every setting on validation, {seeds} seed{'s' if seeds > 1 else ''}")
    save(plt, figure, file)
