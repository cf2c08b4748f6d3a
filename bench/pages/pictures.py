"""Pictures of the rows: time in times of the floor and by stage, peak memory, and the roofline of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeshard.bench import rows
from safeshard.streamer.extras import require

Row = dict[str, str]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")  # Okabe and Ito
MARKS = {"torch": "o", "triton": "s", "published": "x"}
STAGES = ("read", "calibrate", "factor", "compute", "write", "copy", "hash", "sync")
WITHIN = {"compute": ("factor", "write", "copy"), "write": ("hash",)}  # what a stage of the manifest holds besides
FLOOR, WALL = "#000000", "#BBBBBB"


def draw(results: Path) -> list[Path]:
    """Draw each picture whose rows are there as results/<name>.png; return the files written."""
    pipeline, kernels = rows.read("pipeline"), rows.read("kernels")
    figures = {"jobs": jobs(pipeline), "memory": memory(pipeline), "roofline": roofline(kernels)}
    files = {results / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for file, figure in files.items():
        figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return list(files)


def jobs(found: Sequence[Row]) -> Any | None:
    """How many times plain reading each whole job takes, of each model's deepest, and what its threads do meanwhile."""
    measured = rows.whole_jobs(found)
    if not measured:
        return None
    figure = _figure(11, 2.4 + 0.36 * len(measured))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row['what']}\n{row['shape']}, {row['cache']}" for row in measured]
    times = [1 / float(row["share_of_ceiling"]) for row in measured]
    left.barh(names, times, color=WALL)
    left.axvline(1, color=FLOOR, label="a process that reads the same bytes")
    for name, ratio, row in zip(names, times, measured, strict=True):
        text = f" {ratio:.1f} times, {float(row['median_s']):.3g} s"
        left.annotate(text, (max(ratio, 1), name), va="center", fontsize=8)
    left.set(xlabel="wall time, in times of plain reading", title="Whole jobs beside plain reading", xscale="log",
             xlim=(min(0.3, *times), 6 * max(times)))  # fmt: skip
    left.xaxis.set_major_formatter("{x:g}")
    stages = [_stages(row["stages"]) for row in measured]
    totals = [sum(each.values()) or 1.0 for each in stages]
    starts = [0.0] * len(measured)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        if not any(stage in each for each in stages):
            continue
        widths = [100 * each.get(stage, 0.0) / total for each, total in zip(stages, totals, strict=True)]
        right.barh(names, widths, left=starts, color=colour, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    right.set(xlabel="share of thread-seconds (%)", title="What the threads of each job do", xlim=(0, 100))
    left.invert_yaxis()
    for panel in (left, right):
        panel.tick_params(axis="y", labelsize=8)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9 / figure.get_figheight()), ncols=4, fontsize=8)
    return figure


def memory(found: Sequence[Row]) -> Any | None:
    """Peak host memory of SafeMERGE jobs against the number of layers and of adapters, and the bytes they move."""
    merges = [row for row in found if row["what"].startswith("safemerge, ") and row["layers"] and row["adapters"]]
    single = [row for row in merges if row["adapters"] == "1"]
    panels = {"layers": ("decoder layers", single), "adapters": ("adapters in one batch", _most_batches(merges))}
    panels = {column: panel for column, panel in panels.items() if len(panel[1]) > 1}
    if not panels:
        return None
    colours = dict(zip(dict.fromkeys(map(rows.model, rows.by_size(merges))), COLOURS, strict=False))
    figure = _figure(5.5 * len(panels), 4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (column, (label, chosen)) in zip(axes, panels.items(), strict=True):
        for model in dict.fromkeys(map(rows.model, rows.by_size(chosen))):
            colour = colours[model]
            highest = {int(row[column]): row for row in sorted(chosen, key=_peak) if rows.model(row) == model}
            places = sorted(highest)
            own = [highest[place] for place in places]
            panel.plot(places, _giga(own, "peak_rss_bytes"), "o-", color=colour, label=f"{model}: peak memory")
            panel.plot(places, _giga(own, "bytes"), "s--", color=colour, alpha=0.6, label=f"{model}: read and written")
        panel.set(xlabel=label, ylabel="GB", xscale="log", yscale="log", title=f"SafeMERGE: memory against {column}")
        ticks = [0]
        for place in sorted({int(row[column]) for row in chosen}):
            ticks += [place] * (place > 1.2 * ticks[-1])  # closer ones would run together
        ticks = ticks[1:]
        panel.set_xticks(ticks, map(str, ticks))
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def roofline(found: Sequence[Row]) -> Any | None:
    """Operations a second of each kernel against operations a byte, a panel each machine, under its ceilings."""
    machines = list(dict.fromkeys(row["hardware"] for row in found if row["ceiling"]))
    if not machines:
        return None
    figure = _figure(8.5 * len(machines), 5.5)
    for panel, machine in zip(figure.subplots(1, len(machines), squeeze=False)[0], machines, strict=True):
        own = [row for row in found if row["hardware"] == machine]
        points = [row for row in own if row["ceiling"]]
        _roofs(panel, own, [_intensity(row) for row in points])
        operations = list(dict.fromkeys(row["what"] for row in points))
        for operation, colour in zip(operations, COLOURS, strict=False):
            for backend, mark in MARKS.items():
                chosen = [row for row in points if (row["what"], row["backend"]) == (operation, backend)]
                label = f"{operation}, {backend}" if chosen else None
                panel.plot([_intensity(row) for row in chosen], [_tera(row) for row in chosen], mark, color=colour,
                           label=label, alpha=0.8)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="least operations a byte moved (FLOP/byte)", ylabel="TFLOP/s",
                  title=f"Kernels under the machine's ceilings: higher is faster\n{machine}")  # fmt: skip
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _roofs(panel: Any, own: Sequence[Row], intensities: Sequence[float]) -> None:
    """The lines that the copy and the square product of the same machine draw: bytes and operations a second."""
    copies = [float(row["GB_per_s"]) for row in own if row["what"] == "copy"]
    products = {row["dtype"]: _tera(row) for row in own if row["what"] == "square product"}
    low, high = min(intensities) / 2, max(intensities) * 4
    for (dtype, rate), style in zip(products.items(), ("-", "--"), strict=False):
        edge = [rate / copy * 1e3 for copy in copies]
        places = sorted({low, high, *(place for place in edge if low < place < high)})
        heights = [min([rate, *(place * copy / 1e3 for copy in copies)]) for place in places]
        panel.plot(places, heights, style, color="black", label=f"copy and {dtype} product")


def _most_batches(found: Sequence[Row]) -> list[Row]:
    """The rows of each model at the one number of layers, the deepest, that has most sizes of batches."""
    sizes: dict[str, dict[int, set[str]]] = {}
    for row in found:
        sizes.setdefault(rows.model(row), {}).setdefault(int(row["layers"]), set()).add(row["adapters"])
    best = {model: max(own, key=lambda layers: (len(own[layers]), layers)) for model, own in sizes.items()}
    return [row for row in found if int(row["layers"]) == best[rows.model(row)]]


def _peak(row: Row) -> float:
    return float(row["peak_rss_bytes"] or 0)


def _stages(column: str) -> dict[str, float]:
    """Thread-seconds by stage, each without the stages inside it, in the order of a job."""
    whole = {name: float(seconds) for name, _, seconds in (pair.partition("=") for pair in column.split())}
    for outer, inner in WITHIN.items():
        if outer in whole:
            whole[outer] = max(0.0, whole[outer] - sum(whole.get(stage, 0.0) for stage in inner))
    return {stage: whole[stage] for stage in STAGES if stage in whole}


def _giga(found: Sequence[Row], column: str) -> list[float]:
    return [float(row[column] or math.nan) / 1e9 for row in found]


def _intensity(row: Row) -> float:
    return float(row["operations"]) / float(row["bytes"])


def _tera(row: Row) -> float:
    return float(row["TFLOP_per_s"])


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
