"""How many tokens of the calibration came to each expert: heat maps, layers x experts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from safeshard.manifests.report.heatmap import MAX_CELLS, SHADES, Cell, Map
from safeshard.manifests.schema import ModuleEntry

COLUMNS = 16  # experts of one table: a printed page holds no more
_EXPERT = re.compile(r"(.+)\.experts\.(\d{1,9})\.[^.]+")
_LEANS = "their Grams lean on all tokens"
Seen = dict[str, dict[int, tuple[int, float]]]  # layer -> expert -> its tokens, and the share of all tokens' Gram


@dataclass(frozen=True)
class Experts:
    """A line about the experts, and maps of the tokens that came to each: none where there are too many cells.

    A cell's border marks an expert with too few tokens.
    """

    line: str
    maps: tuple[Map, ...]


def tokens_of_experts(modules: tuple[ModuleEntry, ...]) -> Experts | None:
    """What the entries tell of experts' tokens; None where they tell nothing."""
    seen: Seen = {}
    for module in modules:
        if module.tokens is not None and (match := _EXPERT.fullmatch(module.name)):
            row = seen.setdefault(match[1], {})
            expert, shared = int(match[2]), module.shared_gram or 0.0
            row[expert] = (module.tokens, max(shared, row.get(expert, (0, 0.0))[1]))
    if not seen:
        return None
    counts = [count for row in seen.values() for count, _ in row.values()]
    few = sum(shared > 0 for row in seen.values() for _, shared in row.values())
    line = f"{len(counts)} experts in {len(seen)} layers, {min(counts)} to {max(counts)} tokens each; "
    line += f"{few} have too few, {counts.count(0)} of them none: {_LEANS}." if few else "all have enough."
    experts = sorted({expert for row in seen.values() for expert in row})
    room = (len(seen) + 1) * (len(experts) + 1) <= MAX_CELLS
    starts = range(0, len(experts), COLUMNS) if room else ()
    return Experts(line, tuple(_map(seen, experts[start : start + COLUMNS], max(counts)) for start in starts))


def _map(seen: Seen, experts: list[int], most: int) -> Map:
    rows = tuple(
        (layer, tuple(_cell(f"{layer}.experts.{expert}", row.get(expert), most) for expert in experts))
        for layer, row in seen.items()
    )
    caption = f"tokens of experts {experts[0]} to {experts[-1]}"
    return Map(caption, tuple((str(expert), f"expert {expert}") for expert in experts), rows)


def _cell(name: str, found: tuple[int, float] | None, most: int) -> Cell:
    if found is None:
        return Cell()
    count, shared = found
    shade = min(count * SHADES // (most + 1), SHADES - 1)
    title = f"{name}: {count} tokens" + (f", {shared:.0%} of its Gram is that of all tokens" if shared else "")
    return Cell(str(count), f"kept s{shade}" + " near" * (shared > 0), title)
