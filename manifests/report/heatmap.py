"""The decisions as heat maps, layers x kinds of module: shade for the value, mark and weight for the decision."""

from dataclasses import dataclass
from statistics import fmean
from xml.etree.ElementTree import Element

from safeshard.manifests.grid import MARKS, MEANINGS, NEAR, Stack, arrange, cell_text, number, number_name, prevailing
from safeshard.manifests.report.markup import tag
from safeshard.manifests.schema import ModuleEntry

MAX_CELLS = 20_000  # of an output's maps, heads included; 126 layers of 7 modules have about a thousand
SHADES = 8


@dataclass(frozen=True)
class Scale:
    """The range of the values, cut into shades; a cosine or a share beyond [-1, 1] is shaded as at that bound."""

    low: float
    high: float

    def shade(self, value: float) -> int:
        """0 to SHADES - 1."""
        if self.high <= self.low:
            return SHADES // 2
        return min(int((_bounded(value) - self.low) / (self.high - self.low) * SHADES), SHADES - 1)


def heat_maps(modules: tuple[ModuleEntry, ...]) -> tuple[list[Element], list[ModuleEntry]]:
    """A legend and a map for each stack of layers; and the modules that are in none of them."""
    stacks, others = arrange(modules)
    values = [_bounded(value) for module in modules if (value := number(module)) is not None]
    scale = Scale(min(values), max(values)) if values else None
    maps: list[Element] = []
    room = MAX_CELLS
    for stack in stacks:
        cells = (len(stack.layers) + 1) * (len(stack.titles) + 1)
        if cells <= room:
            room -= cells
            maps.append(_map(stack, scale))
        else:
            others += [module for cell in stack.cells.values() for module in cell]
    return ([_legend(modules, scale), *maps] if maps else []), others


def value_name(modules: tuple[ModuleEntry, ...]) -> str:
    """What the number of a cell is."""
    return number_name(modules).replace("the delta's ", "")


def _bounded(value: float) -> float:
    return min(max(value, -1.0), 1.0)


def _map(stack: Stack, scale: Scale | None) -> Element:
    heads = [tag("th", title, scope="col", title=kind) for kind, title in stack.titles.items()]
    rows = [
        tag(
            "tr",
            tag("th", layer, scope="row"),
            *(_cell(stack.cells.get((layer, kind), ()), scale) for kind in stack.titles),
        )
        for layer in stack.layers
    ]
    head = tag("thead", tag("tr", tag("th", "layer", scope="col"), *heads))
    grid = tag("table", tag("caption", stack.prefix), head, tag("tbody", *rows), class_="heat")
    return tag("div", grid, class_="wide")


def _cell(modules: tuple[ModuleEntry, ...], scale: Scale | None) -> Element:
    if not modules:
        return tag("td", class_="none")
    values = [value for module in modules if (value := number(module)) is not None]
    classes: list[str] = [prevailing(modules)]
    if scale and values:
        classes.append(f"s{scale.shade(fmean(map(_bounded, values)))}")
    if any(module.near_threshold for module in modules):
        classes.append("near")
    return tag("td", cell_text(modules), class_=" ".join(classes), title=_title(modules))


def _title(modules: tuple[ModuleEntry, ...]) -> str:
    first = modules[0]
    if len(modules) > 1:
        return f"{len(modules)} modules, the first {first.name}"
    value = "" if (known := number(first)) is None else f" {known:.6g},"
    return f"{first.name}:{value} {MEANINGS[first.decision]}" + (f" ({first.note})" if first.note else "")


def _legend(modules: tuple[ModuleEntry, ...], scale: Scale | None) -> Element:
    used = {module.decision for module in modules}
    items = [tag("span", f"{mark} {MEANINGS[d]}", class_=f"key {d}") for d, mark in MARKS.items() if d in used]
    if any(module.near_threshold for module in modules):
        items.append(tag("span", f"{NEAR} within 1e-5 of the threshold", class_="key near"))
    if scale:
        name = value_name(modules)
        low, high = (f"{bound:.3f}" if name == "cosine" else f"{bound:.1%}" for bound in (scale.low, scale.high))
        ramp = tag("span", *(tag("i", class_=f"s{shade}") for shade in range(SHADES)), class_="ramp")
        items.append(tag("span", f"{name} {low} ", ramp, f" {high}"))
    return tag("p", *items, class_="legend")
