"""Why no module of an adapter fits, in one sentence: another base model's, or another rank than its config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safeshard.manifests.errors import Offence

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """The shapes of a module's A and B, the rank that the config says, and the shape of the weight they belong to."""

    a: Shape
    b: Shape
    rank: int
    weight: Shape

    @property
    def widths(self) -> Shape:
        """Outputs x inputs of the weight that the pair was trained on."""
        return (self.b[0], self.a[1])

    @property
    def is_lora(self) -> bool:
        """Whether A and B have one rank, whichever."""
        return len(self.a) == len(self.b) == 2 and self.a[0] == self.b[1]


def another_base(where: str, base: str, hidden: int | None, pairs: Mapping[str, Pair]) -> Offence | None:
    """The offence of an adapter of which no module has the widths of `base`, whose hidden size is `hidden`."""
    if len(pairs) < 2 or any(not p.is_lora or p.widths == p.weight for p in pairs.values()):
        return None
    remedy = f"give the adapter's own base model in place of {base}"
    theirs = {p.a[1] for p in pairs.values() if p.weight[1] == hidden}
    theirs |= {p.b[0] for p in pairs.values() if p.weight[0] == hidden and p.weight[1] != hidden}
    if hidden is not None and len(theirs) == 1 and hidden not in theirs:
        return Offence(
            where, "", f"an adapter of {base}, of hidden size {hidden}", f"hidden size {theirs.pop()}", remedy
        )
    name, pair = next(iter(pairs.items()))
    expected, got = (f"{a} x {b}" for a, b in (pair.weight, pair.widths))
    return Offence(
        where, "", f"an adapter of {base}, whose {name} is {expected}", f"no module that fits: {got}", remedy
    )


def another_rank(config: str, r: int, pairs: Mapping[str, Pair]) -> Offence | None:
    """The offence of a config whose `r` no module has, where all have one and the same other rank."""
    ranks = {(p.rank, p.a[0]) for p in pairs.values() if p.is_lora and p.widths == p.weight}
    fit = all(p.is_lora and p.widths == p.weight for p in pairs.values())
    if len(pairs) < 2 or not fit or len(ranks) != 1:
        return None
    said, own = ranks.pop()
    if said != r or own == r:
        return None
    remedy = "correct it; the scaling is made of it and lora_alpha"
    return Offence(config, "r", f"{own}, the rank of A and B in every module", str(r), remedy)
