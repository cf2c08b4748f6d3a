"""Rows of the real model as a table and as sentences."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

COLUMNS = (
    "seed", "model", "method", "setting", "split", "chosen",
    "attack", "attack_low", "attack_high", "attack_prompts",
    "over_refusal", "over_refusal_low", "over_refusal_high", "over_refusal_prompts",
    "task", "task_low", "task_high", "task_prompts", "perplexity", "versions", "hardware", "commit", "date",
)  # fmt: skip
Row = Mapping[str, str]
HEADS = ("model", "method", "seed", "setting", "attack success %", "over-refusal %", "task %", "perplexity")


def read(path: Path) -> list[Row]:
    """The newest row of each measurement of a CSV file."""
    with path.open(newline="") as lines:
        rows = {tuple(row[c] for c in COLUMNS[:5]): row for row in csv.DictReader(lines)}
    return list(rows.values())


def markdown(rows: Sequence[Row]) -> str:
    """The test's figures: what was given, the setting that validation chose, and the best factor of `scale`."""
    lines = [list(HEADS), ["---"] * len(HEADS)]
    for row in (row for row in rows if row["split"] == "test"):
        shares = [f"{float(row[c]):.0f} ({float(row[c + '_low']):.0f} to {float(row[c + '_high']):.0f})"
                  for c in ("attack", "over_refusal", "task")]  # fmt: skip
        mark = " (chosen)" if row["chosen"] else ""
        perplexity = f"{float(row['perplexity']):.1f}" if row["perplexity"] else ""
        lines.append([row["model"], row["method"] + mark, row["seed"], row["setting"], *shares, perplexity])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def curves(rows: Sequence[Row], model: str) -> dict[str, list[tuple[float, float]]]:
    """By method, (task, attack success) of each setting on validation, means over seeds."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["model"] == model and row["split"] == "validation":
            found.setdefault(row["method"], {}).setdefault(row["setting"], []).append(row)
    return {
        method: [(mean(float(r["task"]) for r in group), mean(float(r["attack"]) for r in group))
                 for group in settings.values()]
        for method, settings in found.items()
    }  # fmt: skip
