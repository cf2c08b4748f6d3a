"""The decisions as heat maps, layers x kinds of module: what is treated has colour, deeper where the value is lower."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from safeshard.manifests.grid import MARKS, MEANINGS, NEAR, Stack, arrange, cell_text, number, number_name, prevailing
from safeshard.manifests.schema import ModuleEntry

MAX_CELLS = 20_000  # of an output's maps, heads included; 126 layers of 7 modules have about a thousand
SHADES = 8
COLUMNS = 7  # of one table: a printed page holds no more


@dataclass(frozen=True)
class Scale:
    """The range of the values, cut into shades; a cosine or a share beyond [-1, 1] is shaded as at that bound."""

    low: float
    high: float

    def shade(self, value: float) -> int:
        """SHADES - 1 for the lowest value, which is pulled furthest, to 0."""
        if self.high <= self.low:
            return SHADES // 2
        return SHADES - 1 - min(int((bounded(value) - self.low) / (self.high - self.low) * SHADES), SHADES - 1)


@dataclass(frozen=True)
class Cell:
    """What a layer and a kind have."""

    text: str = ""
    classes: str = "none"
    title: str = ""


@dataclass(frozen=True)
class Map:
    """At most `COLUMNS` kinds of one stack of layers."""

    caption: str
    heads: tuple[tuple[str, str], ...]  # title, kind
    rows: tuple[tuple[int | str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Maps:
    """All maps of an output, what their cells mean, and the modules that are in none."""

    maps: tuple[Map, ...]
    keys: tuple[tuple[str, str], ...]  # class, text
    name: str
    low: str
    high: str
    others: tuple[ModuleEntry, ...]
    shades: tuple[int, ...] = tuple(range(SHADES))


def heat_maps(modules: tuple[ModuleEntry, ...]) -> Maps:
    """The maps of each stack of layers."""
    stacks, others = arrange(modules)
    values = [bounded(value) for module in modules if (value := number(module)) is not None]
    scale = Scale(min(values), max(values)) if values else None
    maps: list[Map] = []
    room = MAX_CELLS
    for stack in stacks:
        cells = (len(stack.layers) + 1) * (len(stack.titles) + 1)
        if cells <= room:
            room -= cells
            maps += _parts(stack, scale)
        else:
            others += [module for cell in stack.cells.values() for module in cell]
    name = value_name(modules)
    bounds = (scale.low, scale.high) if scale else ()
    low, high = (f"{bound:.3f}" if name == "cosine" else f"{bound:.1%}" for bound in bounds) if bounds else ("", "")
    return Maps(tuple(maps), _keys(modules), name, low, high, tuple(others))


def value_name(modules: tuple[ModuleEntry, ...]) -> str:
    """What the number of a cell is."""
    return number_name(modules).replace("the delta's ", "")


def bounded(value: float) -> float:
    """A cosine or a share as it is drawn."""
    return min(max(value, -1.0), 1.0)


def _parts(stack: Stack, scale: Scale | None) -> list[Map]:
    """The stack's kinds, so many a map."""
    kinds = iter(stack.titles.items())
    parts = []
    while chosen := tuple(islice(kinds, COLUMNS)):
        rows = tuple(
            (layer, tuple(_cell(stack.cells.get((layer, kind), ()), scale) for kind, _ in chosen))
            for layer in stack.layers
        )
        parts.append((tuple((title, kind) for kind, title in chosen), rows))
    count = f", {{}} of {len(parts)}" if len(parts) > 1 else ""
    return [Map(stack.prefix + count.format(n), heads, rows) for n, (heads, rows) in enumerate(parts, 1)]


def _cell(modules: tuple[ModuleEntry, ...], scale: Scale | None) -> Cell:
    if not modules:
        return Cell()
    values = [value for module in modules if (value := number(module)) is not None]
    classes: list[str] = [prevailing(modules)]
    if scale and values:
        classes.append(f"s{scale.shade(fmean(map(bounded, values)))}")
    if any(module.near_threshold for module in modules):
        classes.append("near")
    return Cell(cell_text(modules), " ".join(classes), _title(modules))


def _title(modules: tuple[ModuleEntry, ...]) -> str:
    first = modules[0]
    if len(modules) > 1:
        return f"{len(modules)} modules, the first {first.name}"
    value = "" if (known := number(first)) is None else f" {known:.6g},"
    return f"{first.name}:{value} {MEANINGS[first.decision]}" + (f" ({first.note})" if first.note else "")


def _keys(modules: tuple[ModuleEntry, ...]) -> tuple[tuple[str, str], ...]:
    used = {module.decision for module in modules}
    keys = [(f"{d} s5", f"{mark} {MEANINGS[d]}") for d, mark in MARKS.items() if d in used]
    if any(module.near_threshold for module in modules):
        keys.append(("near", f"{NEAR} within 1e-5 of the threshold"))
    return tuple(keys)
