"""Outputs beside each other: a row each, the trade-off of those that were evaluated alike, any two heat maps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from markupsafe import Markup

from safeshard.manifests.errors import printable
from safeshard.manifests.evaluation import MEASURES, Figure, percent
from safeshard.manifests.grid import share_text
from safeshard.manifests.render import leak_text
from safeshard.manifests.report.axes import Picture
from safeshard.manifests.report.evaluations import Measured, share
from safeshard.manifests.report.heatmap import MAX_CELLS, Maps
from safeshard.manifests.report.markup import Child, Table, link, table
from safeshard.manifests.report.output import Output
from safeshard.manifests.report.tradeoff import Point, tradeoff
from safeshard.manifests.sizes import human

MAX_OPTIONS = 40  # that are compared
MAX_SETTING = 40  # characters of one
MAX_PAIRED = 40  # outputs among which two are chosen


@dataclass(frozen=True)
class Row:
    """What is kept of an output for the comparison."""

    number: int
    title: str
    method: str
    options: dict[str, str]
    changed: str
    kept_norm: float | None
    cosine: float | None
    leak: float | None
    remarks: int
    read: int
    wall_s: float
    blake3: str | None
    maps: Maps


@dataclass(frozen=True)
class Comparison:
    """The part of a page that is about several outputs."""

    table: Table
    tradeoffs: list[Picture]
    paired: list[Row]
    left_out: int


def row_of(number: int, output: Output) -> Row:
    """What the comparison keeps of an output; the rest may be forgotten."""
    manifest = output.manifest
    effect, method, modules = manifest.effect, manifest.method, manifest.modules
    options = {"seed": method.seed} | method.options if method.seed is not None else method.options
    given = [(name, value) for name, value in islice(options.items(), MAX_OPTIONS) if value is not None]
    return Row(
        number=number,
        title=output.title,
        method=method.name,
        options={name: printable(json.dumps(value), MAX_SETTING) for name, value in given},
        changed=f"{sum(m.decision != 'kept' for m in modules)} of {len(modules)}",
        kept_norm=effect.kept_norm if effect else None,
        cosine=effect.cosine if effect else None,
        leak=manifest.leak,
        remarks=len(manifest.fallbacks) + len(manifest.warnings or ()),
        read=manifest.run.bytes_read,
        wall_s=manifest.run.wall_s,
        blake3=manifest.blake3,
        maps=output.maps,
    )  # fmt: skip


def compared(rows: Sequence[Row], measured: Sequence[Measured]) -> Comparison:
    """All that is said about the outputs together."""
    pictures = [tradeoff([*_points(rows, each)], f"Trade-off by {each.suite}") for each in measured]
    paired = [*_paired(rows)]
    return Comparison(
        _table(rows, measured), [p for p in pictures if p is not None], paired if len(paired) > 1 else [],
        len(rows) - len(paired),
    )  # fmt: skip


def _table(rows: Sequence[Row], measured: Sequence[Measured]) -> Table:
    columns = [(each, measure) for each in measured for measure in each.measures]
    heads = [f"{MEASURES[measure]} %" + (f" ({printable(each.suite, 40)})" if len(measured) > 1 else "")
             for each, measure in columns]  # fmt: skip
    heads = [head if heads.count(head) == 1 else f"{head} {n + 1}" for n, head in enumerate(heads)]
    fixed = ["output", "method", "settings", "modules changed", "norm left", "cosine"]
    leaks = ["leak"] if any(row.leak is not None for row in rows) else []
    last = ["notes", "read", "time"]
    settings = _settings(rows)

    def cells(row: Row) -> list[Child]:
        title = link(f"{row.number} {row.title}", f"#output-{row.number}")
        found: list[Child] = [title, row.method, settings[row.number], row.changed]
        found.append(None if row.kept_norm is None else share_text(row.kept_norm))
        found.append(None if row.cosine is None else f"{row.cosine:.4f}")
        found += [None if row.leak is None else leak_text(row.leak)] * len(leaks)
        found += [_share(each.outputs.get(row.blake3 or "", []), measure) for each, measure in columns]
        return [*found, row.remarks or None, human(row.read), f"{row.wall_s:.2f} s"]

    return table("outputs", [*fixed, *leaks, *heads, *last], rows, cells, [*fixed[4:], *leaks, *heads, *last])


def _share(figures: Sequence[Figure], measure: str) -> Child:
    if not figures:
        return None
    found = share(figures, measure)
    if found is None:
        return "-"
    return Markup("{} <small>{} to {}</small>").format(*map(percent, found))


def _settings(rows: Sequence[Row]) -> dict[int, str]:
    """The options in which outputs of a method differ; where there is one output, or no difference, all of them."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(row)
    found = {}
    for peers in methods.values():
        names = {name for row in peers for name in row.options}
        differing = {name for name in names if len({row.options.get(name) for row in peers}) > 1}
        for row in peers:
            shown = {name: value for name, value in row.options.items() if name in (differing or names)}
            found[row.number] = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    return found


def _points(rows: Sequence[Row], measured: Measured) -> Iterator[Point]:
    outputs = {row.blake3: row for row in rows if row.blake3}
    for model, figures in measured.models.values():
        utility, attack = share(figures, "utility"), share(figures, "attack_success")
        if utility is None or attack is None:
            continue
        row = outputs.get(model.manifest_blake3 or "")
        if row is not None:
            yield Point(str(row.number), row.title, row.method, utility, attack)
        elif model.manifest_blake3 is None:  # what was there before: the aligned model, the fine-tuned one
            yield Point(model.name, model.name, "", utility, attack)


def _paired(rows: Sequence[Row]) -> Iterator[Row]:
    """The first outputs whose maps find room."""
    room = MAX_CELLS
    for row in rows[:MAX_PAIRED]:
        room -= sum((len(m.rows) + 1) * (len(m.heads) + 1) for m in row.maps.maps)
        if room < 0:
            return
        if row.maps.maps:
            yield row
