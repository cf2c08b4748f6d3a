"""What was decided layer by layer, as small pictures: budget or penalty, share kept, loss or leak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from markupsafe import Markup

from safeshard.manifests.grid import Stack, arrange
from safeshard.manifests.report.axes import BOUND, LEFT, RIGHT, WIDTH, Axis, Mark, Picture, axis_of
from safeshard.manifests.report.markup import table
from safeshard.manifests.schema import ModuleEntry

HEIGHT, TOP, BOTTOM = 220, 40, 46
MAX_DOTS = 4000  # of a picture; with more modules only the medians are drawn
MAX_PICTURES = 12
QUANTITIES: dict[str, Callable[[ModuleEntry], float | None]] = {
    "budget": lambda m: m.budget,
    "penalty": lambda m: m.penalty,
    "share of entries kept": lambda m: m.selected_fraction,
    "loss": lambda m: m.loss,
    "leak": lambda m: m.leak,
    "share of the norm left": lambda m: m.effect.kept_norm if m.effect else None,
}


def by_layer(modules: tuple[ModuleEntry, ...]) -> list[Picture]:
    """A picture of each quantity that modules of a stack have: a dot a module, a line through the layers' medians.

    What is the same everywhere is left out: the table of options says it.
    """
    pictures = []
    for stack in arrange(modules)[0]:
        for name, quantity in QUANTITIES.items():
            known = _known(stack, quantity)
            values = [value for each in known.values() for value in each]
            if len(known) > 1 and max(values) > min(values):
                pictures.append(_picture(stack, name, known, values))
    return pictures[:MAX_PICTURES]


def _known(stack: Stack, quantity: Callable[[ModuleEntry], float | None]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for (layer, _), cell in stack.cells.items():
        values = [min(max(value, -BOUND), BOUND) for module in cell if (value := quantity(module)) is not None]
        if values:
            found.setdefault(layer, []).extend(values)
    return dict(sorted(found.items()))


def _picture(stack: Stack, name: str, known: Mapping[int, Sequence[float]], values: Sequence[float]) -> Picture:
    first, last = min(known), max(known)
    x = Axis(first - 0.5, last + 0.5, LEFT, WIDTH - RIGHT, whole=True)
    y = axis_of(values, HEIGHT - BOTTOM, TOP)
    middles = {layer: median(each) for layer, each in known.items()}
    low, high = (pick(middles, key=lambda layer: middles[layer]) for pick in (min, max))
    return Picture(
        f"{name} by layer of {stack.prefix}",
        f"A dot is a module, the line joins the medians of the layers: least in layer {low} ({middles[low]:.4g}), "
        f"most in layer {high} ({middles[high]:.4g}).",
        x, y, "layer", name, HEIGHT, [*_dots(x, y, known, len(values)), *_line(x, y, middles)],
        table(f"{name} by layer", ["layer", "least", "median", "most", "modules"], list(known.items()), _row,
              ["least", "median", "most", "modules"]),
    )  # fmt: skip


def _row(item: tuple[int, Sequence[float]]) -> list[str | int]:
    layer, values = item
    return [layer, *(f"{value:.5g}" for value in (min(values), median(values), max(values))), len(values)]


def _dots(x: Axis, y: Axis, known: Mapping[int, Sequence[float]], count: int) -> Iterator[Mark]:
    if count <= MAX_DOTS:
        for layer, values in known.items():
            for value in values:
                yield Mark("circle", {"cx": x.at(layer), "cy": y.at(value), "r": 3}, "dot")


def _line(x: Axis, y: Axis, middles: Mapping[int, float]) -> Iterator[Mark]:
    points = " ".join(f"{x.at(layer)},{y.at(value)}" for layer, value in middles.items())
    yield Mark("polyline", {"points": Markup(points)}, "median")
