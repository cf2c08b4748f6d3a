"""Modules arranged as layers x kinds, the form in which people read decisions.

`model.layers.3.mlp.up_proj` is layer 3 of the stack `model.layers`, of kind `mlp.up_proj`. Experts of a layer share
one kind: `mlp.experts.17.up_proj` is of kind `mlp.experts.*.up_proj`, and a cell then holds several modules.

Names are hostile: those made so that n modules would span n x n places, or share n^2 endings, stand alone instead.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from safeshard.manifests.schema import Decision, Effect, ModuleEntry

MARKS: dict[Decision, str] = {
    "kept": "·",
    "merged": "●",
    "projected": "▼",
    "selected": "◆",
    "shrunk": "▽",
    "scaled": "◇",
    "reverted": "○",
}
MEANINGS: dict[Decision, str] = {
    "kept": "kept as fine-tuned",
    "merged": "merged",
    "projected": "projected",
    "selected": "selected and compensated",
    "shrunk": "shrunk where safe inputs excite it",
    "scaled": "scaled",
    "reverted": "kept as aligned",
}
NEAR = "~"
MAX_SPARSITY = (
    16  # places of a grid for each that holds a module; models are dense, hybrids of two kinds of layer half so
)
MAX_PARTS = 32  # of a dotted name; models have up to 10


@dataclass(frozen=True)
class Stack:
    """The layers under one prefix: cells by (layer, kind), and a short title for every kind, in model order."""

    prefix: str
    layers: tuple[int, ...]
    titles: dict[str, str]
    cells: dict[tuple[int, str], tuple[ModuleEntry, ...]]


def arrange(modules: Iterable[ModuleEntry]) -> tuple[list[Stack], list[ModuleEntry]]:
    """The stacks, and the modules that stand alone: no layer number in their names, or too sparse a stack for a grid.

    All places of all stacks together, empty ones included, are at most `MAX_SPARSITY` times the modules.
    """
    stacks: dict[str, dict[tuple[int, str], list[ModuleEntry]]] = {}
    others = []
    for module in modules:
        place = _place(module.name)
        if place is None:
            others.append(module)
        else:
            prefix, layer, kind = place
            stacks.setdefault(prefix, defaultdict(list))[layer, kind].append(module)
    dense = {prefix: cells for prefix, cells in stacks.items() if _places(cells) <= MAX_SPARSITY * len(cells)}
    others += [m for prefix, cells in stacks.items() if prefix not in dense for ms in cells.values() for m in ms]
    return [_stack(prefix, cells) for prefix, cells in dense.items()], others


def cell_text(modules: tuple[ModuleEntry, ...]) -> str:
    """A cell in words: the value and mark of one module; of several, their range and the count of decisions."""
    if len(modules) == 1:
        return f"{_value(modules[0])}{NEAR if modules[0].near_threshold else ' '}{MARKS[modules[0].decision]}".strip()
    values = sorted((value, _value(m)) for m in modules if (value := number(m)) is not None)
    spread = f"{values[0][1]}..{values[-1][1]} " if values else ""
    counts = Counter(module.decision for module in modules)
    shown: list[Decision] = [decision for decision in counts if decision != "kept"] or ["kept"]
    return f"{spread}{' '.join(f'{MARKS[decision]}{counts[decision]}' for decision in shown)}/{len(modules)}"


def number(module: ModuleEntry) -> float | None:
    """The value that a cell shows: the share of entries that Safe Delta kept, the gate's cosine, or ridge's leak."""
    known = (module.selected_fraction, module.cosine, module.leak)
    return next((value for value in known if value is not None), None)


def number_name(modules: Iterable[ModuleEntry]) -> str:
    """What `number` is of these modules."""
    modules = tuple(modules)
    if any(m.selected_fraction is not None for m in modules):
        return "share of the delta's entries kept"
    leaks = any(m.leak is not None for m in modules) and all(m.cosine is None for m in modules)
    return "leak" if leaks else "cosine"


def kept_text(modules: tuple[ModuleEntry, ...]) -> str:
    """The share of the delta's norm that is left of one module, or the range of several."""
    shares = sorted(m.effect.kept_norm for m in modules if m.effect and m.effect.kept_norm is not None)
    texts = [share_text(share) for share in (shares[:1] + shares[-1:] if len(modules) > 1 else shares)]
    return "..".join(dict.fromkeys(texts))


def share_text(share: float) -> str:
    """A share of a norm for readers; a hostile one stays short."""
    return f"{share:.1%}" if share < 100 else f"{share:.3g}x"


def effect_text(effect: Effect | None) -> str:
    """What is left of a delta, in words; "" where it was not measured."""
    if effect is None or effect.kept_norm is None:
        return ""
    cosine = "" if effect.cosine is None else f", at a cosine of {effect.cosine:.4f} to it"
    return f"{share_text(effect.kept_norm)} of the fine-tuned delta's norm is left{cosine}"


def prevailing(modules: tuple[ModuleEntry, ...]) -> Decision:
    """The decision that a cell is painted by: the first that is not to keep."""
    return next((module.decision for module in modules if module.decision != "kept"), "kept")


def _place(name: str) -> tuple[str, int, str] | None:
    parts = name.split(".", MAX_PARTS)
    if len(parts) > MAX_PARTS:
        return None
    for index, part in enumerate(parts[:-1]):
        if index and _is_number(part):
            kind = ".".join("*" if _is_number(rest) else rest for rest in parts[index + 1 :])
            return ".".join(parts[:index]), int(part), kind
    return None


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= 9


def _places(cells: dict[tuple[int, str], list[ModuleEntry]]) -> int:
    return len({layer for layer, _ in cells}) * len({kind for _, kind in cells})


def _stack(prefix: str, cells: dict[tuple[int, str], list[ModuleEntry]]) -> Stack:
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = tuple(sorted({layer for layer, _ in cells}))
    return Stack(prefix, layers, _titles(kinds), {place: tuple(modules) for place, modules in cells.items()})


def _titles(kinds: list[str]) -> dict[str, str]:
    """The shortest dotted ending of each kind that no other kind shares, the name before a `*` included."""
    shared = Counter(ending for kind in kinds for ending in _endings(kind))
    return {kind: next((ending for ending in _endings(kind) if shared[ending] == 1), kind) for kind in kinds}


def _endings(kind: str) -> list[str]:
    parts = kind.split(".")
    last = max(parts.index("*") - 1, 0) if "*" in parts else len(parts) - 1
    return [".".join(parts[start:]) for start in range(last, -1, -1)]


def _value(module: ModuleEntry) -> str:
    if module.selected_fraction is not None:
        return f"{module.selected_fraction:.1%}"
    if module.cosine is None and module.leak is not None:
        return f"{module.leak:.2%}"
    return "" if module.cosine is None else f"{module.cosine:.3f}"
