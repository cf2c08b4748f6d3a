"""How many tokens of the calibration came to each expert: a heat map, layers x experts."""

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from safeshard.manifests.report.heatmap import MAX_CELLS, SHADES
from safeshard.manifests.report.markup import tag
from safeshard.manifests.schema import ModuleEntry

_EXPERT = re.compile(r"(.+)\.experts\.(\d{1,9})\.[^.]+")
_LEANS = "their Grams lean on all tokens"


def expert_maps(modules: tuple[ModuleEntry, ...]) -> Iterator[Element]:
    """A line about the experts, and a map of the tokens that came to each; nothing where no entry tells any.

    A cell's border marks an expert with too few tokens. Where there are too many cells, the line stands alone.
    """
    tokens: dict[str, dict[int, tuple[int, float]]] = {}
    for module in modules:
        if module.tokens is not None and (match := _EXPERT.fullmatch(module.name)):
            row = tokens.setdefault(match[1], {})
            expert, shared = int(match[2]), module.shared_gram or 0.0
            row[expert] = (module.tokens, max(shared, row.get(expert, (0, 0.0))[1]))
    if not tokens:
        return
    counts = [count for row in tokens.values() for count, _ in row.values()]
    few = sum(shared > 0 for row in tokens.values() for _, shared in row.values())
    none = counts.count(0)
    line = f"{len(counts)} experts in {len(tokens)} layers, {min(counts)} to {max(counts)} tokens each; "
    line += f"{few} have too few, {none} of them none: {_LEANS}." if few else "all have enough."
    yield tag("h2", "Tokens of each expert")
    yield tag("p", line)
    experts = sorted({expert for row in tokens.values() for expert in row})
    if (len(tokens) + 1) * (len(experts) + 1) <= MAX_CELLS:
        yield _map(tokens, experts, max(counts))


def _map(tokens: dict[str, dict[int, tuple[int, float]]], experts: list[int], most: int) -> Element:
    rows = [
        tag(
            "tr",
            tag("th", path, scope="row"),
            *(_cell(f"{path}.experts.{expert}", row.get(expert), most) for expert in experts),
        )
        for path, row in tokens.items()
    ]
    head = tag("thead", tag("tr", tag("th", "layer", scope="col"), *(tag("th", e, scope="col") for e in experts)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_="heat"), class_="wide")


def _cell(name: str, found: tuple[int, float] | None, most: int) -> Element:
    if found is None:
        return tag("td", class_="none")
    count, shared = found
    shade = min(count * SHADES // (most + 1), SHADES - 1)
    title = f"{name}: {count} tokens" + (f", {shared:.0%} of its Gram is that of all tokens" if shared else "")
    return tag("td", count, class_=f"kept s{shade}" + (" near" if shared else ""), title=title)
