"""The distribution of the cosines (of Safe Delta: of the shares of entries kept) with the threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from safeshard.manifests.grid import number
from safeshard.manifests.report.axes import LEFT, RIGHT, WIDTH, Axis, Mark, Picture
from safeshard.manifests.report.heatmap import bounded, value_name
from safeshard.manifests.report.markup import table
from safeshard.manifests.schema import ModuleEntry

BINS = 24
HEIGHT, TOP, BOTTOM = 280, 64, 46
MAX_LINES = 4  # thresholds; a job has one


def histogram(modules: tuple[ModuleEntry, ...]) -> Picture | None:
    """Bars of equal width, those treated filled and those kept outlined above them; None where there are no values.

    A bin's edge lies on the (lowest) threshold, so that no bar lies across it.
    """
    values = [(bounded(value), m.decision != "kept") for m in modules if (value := number(m)) is not None]
    if not values:
        return None
    thresholds = sorted({m.threshold for m in modules if m.threshold is not None and abs(m.threshold) <= 1})
    edges = _edges([value for value, _ in values], thresholds[:MAX_LINES])
    counts = [[0, 0] for _ in edges[1:]]
    width = edges[1] - edges[0]
    for value, treated in values:
        counts[min(max(int((value - edges[0]) / width), 0), len(counts) - 1)][treated] += 1
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = Axis(0, max(map(sum, counts)) * 1.02, HEIGHT - BOTTOM, TOP, whole=True)
    name, changed = value_name(modules), sum(treated for _, treated in values)
    rows = [(f"{low:.4f} to {high:.4f}", t, k) for (k, t), low, high in zip(counts, edges, edges[1:], strict=False)]
    return Picture(
        f"Histogram of the {name} of {len(values)} modules",
        f"{changed} of {len(values)} modules are treated (filled), {len(values) - changed} kept (outlined).",
        x, y, name, "modules", HEIGHT, [*_bars(x, y, edges, counts), *_lines(x, thresholds[:MAX_LINES])],
        table(name, [name, "treated", "kept"], [row for row in rows if row[1] or row[2]], lambda row: row,
              ["treated", "kept"]),
    )  # fmt: skip


def _edges(values: Sequence[float], thresholds: Sequence[float]) -> list[float]:
    low, high = min([*values, *thresholds]), max([*values, *thresholds])
    if high - low < 1e-6:
        low, high = low - 0.05, high + 0.05
    width = (high - low) / BINS
    start = low
    if thresholds:  # one bin of space on either side keeps the line off the frame
        start = thresholds[0] - (ceil((thresholds[0] - low) / width) + 1) * width
        high += width
    return [start + i * width for i in range(ceil((high - start) / width - 1e-9) + 1)]


def _bars(x: Axis, y: Axis, edges: Sequence[float], counts: Sequence[Sequence[int]]) -> Iterator[Mark]:
    for (kept, treated), left, right in zip(counts, edges, edges[1:], strict=False):
        bottom = 0
        for count, kind in ((treated, "treated"), (kept, "kept")):
            if count:
                place = {
                    "x": x.at(left) + 1, "width": round(x.at(right) - x.at(left) - 2, 1), "y": y.at(bottom + count),
                    "height": round(y.at(bottom) - y.at(bottom + count), 1),
                }  # fmt: skip
                yield Mark("rect", place, kind, f"{count} {kind}, {left:.4f} to {right:.4f}")
            bottom += count


def _lines(x: Axis, thresholds: Sequence[float]) -> Iterator[Mark]:
    for threshold in thresholds:
        at = x.at(threshold)
        yield Mark("line", {"x1": at, "x2": at, "y1": TOP - 10, "y2": HEIGHT - BOTTOM}, "threshold")
        yield Mark(
            "text", {"x": at, "y": TOP - 15, "text-anchor": "middle"}, "threshold", text=f"threshold {threshold:.6g}"
        )
