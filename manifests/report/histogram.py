"""The distribution of the cosines (of Safe Delta: of the shares of entries kept) with the threshold, as inline SVG."""

from collections.abc import Iterator, Sequence
from math import ceil
from xml.etree.ElementTree import Element

from safeshard.manifests.grid import number
from safeshard.manifests.report.heatmap import value_name
from safeshard.manifests.report.markup import tag
from safeshard.manifests.schema import ModuleEntry

BINS = 24
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 210, 44, 16, 24, 44
MAX_LINES = 4  # thresholds; a job has one


def histogram(modules: tuple[ModuleEntry, ...]) -> Element | None:
    """Bars of equal width, those treated filled and those kept outlined above them; None where there are no values.

    A bin's edge lies on the (lowest) threshold, so that no bar lies across it.
    """
    values = [(min(max(value, -1.0), 1.0), m.decision != "kept") for m in modules if (value := number(m)) is not None]
    if not values:
        return None
    thresholds = sorted({m.threshold for m in modules if m.threshold is not None and abs(m.threshold) <= 1})
    edges = _edges([value for value, _ in values], thresholds[:MAX_LINES])
    counts = [[0, 0] for _ in edges[1:]]
    width = edges[1] - edges[0]
    for value, treated in values:
        counts[min(max(int((value - edges[0]) / width), 0), len(counts) - 1)][treated] += 1
    top = max(map(sum, counts))
    name = value_name(modules)
    return tag(
        "svg",
        tag("title", f"Histogram of the {name} of {len(values)} modules"),
        *_bars(edges, counts, top),
        *_axes(edges, top, name),
        *_lines(edges, thresholds[:MAX_LINES]),
        class_="histogram", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
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


def _x(edges: Sequence[float], value: float) -> float:
    return LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)


def _bars(edges: Sequence[float], counts: Sequence[Sequence[int]], top: int) -> Iterator[Element]:
    room = HEIGHT - TOP - BOTTOM
    for (kept, treated), left, right in zip(counts, edges, edges[1:], strict=False):
        bottom = float(HEIGHT - BOTTOM)
        for count, kind in ((treated, "treated"), (kept, "kept")):
            height = count / top * room
            bottom -= height
            if count:
                x, width = _x(edges, left) + 1, _x(edges, right) - _x(edges, left) - 2
                yield tag(
                    "rect", tag("title", f"{count} {kind}, {left:.4f} to {right:.4f}"),
                    x=f"{x:.1f}", y=f"{bottom:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", class_=kind,
                )  # fmt: skip


def _axes(edges: Sequence[float], top: int, name: str) -> Iterator[Element]:
    base = HEIGHT - BOTTOM
    yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis")
    for i in range(7):
        value = edges[0] + (edges[-1] - edges[0]) * i / 6
        yield tag("text", f"{value:.3f}", x=f"{_x(edges, value):.1f}", y=base + 16, text_anchor="middle")
    yield tag("text", f"{name}: filled bars were treated, outlined ones kept", x=LEFT, y=HEIGHT - 6)
    yield tag("text", top, x=LEFT - 8, y=TOP + 8, text_anchor="end")
    yield tag("text", 0, x=LEFT - 8, y=base, text_anchor="end")


def _lines(edges: Sequence[float], thresholds: Sequence[float]) -> Iterator[Element]:
    for threshold in thresholds:
        x = f"{_x(edges, threshold):.1f}"
        yield tag("line", x1=x, x2=x, y1=TOP - 8, y2=HEIGHT - BOTTOM, class_="threshold")
        yield tag("text", f"threshold {threshold:.6g}", x=x, y=TOP - 12, text_anchor="middle", class_="threshold")
