"""The choice of a conversion: both inputs' names as transformers' own, where that makes more of them one.

Prefixes come first (`exchange`). Only where names inside of layers are left over does a conversion of either model's
family stand in: both sides are read as transformers names them, and matched once more. What two conversions read
differently, or two tensors in one way, is not guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from safeshard.streamer.inputs.names.conversions import Conversion, conversions
from safeshard.streamer.inputs.names.exchange import Names, Shapes, exchange
from safeshard.streamer.inputs.names.parts import stack_of

_NUMBERS = re.compile(r"(?<=\.)\d{1,9}(?=\.)|^\d{1,9}(?=\.)")
_SHOWN = 3  # names inside of layers in one line


@dataclass(frozen=True)
class ConvertedNames(Names):
    """Names that differ inside of layers: theirs as transformers' own, then under our prefixes, then as ours.

    Attributes:
        conversion: whose names are read as transformers' own.
        inner: prefixes, between transformers' names of both.
        read: their names and ours, as they are matched.
        stored: transformers' name with our prefixes -> ours.
    """

    conversion: Conversion | None = None
    inner: Names = field(default_factory=Names)
    read: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)

    def ours(self, theirs: str) -> str:
        name = self.inner.ours(self._forward(theirs))
        return self.stored.get(name, name)

    def is_ambiguous(self, theirs: str) -> bool:
        return theirs in self.ambiguous or self.inner.is_ambiguous(self._forward(theirs))

    def theirs(self, ours: str) -> str:
        name = self.inner.theirs(self._forward(ours))
        if (form := self._forms.get(_form(name))) is not None:
            numbers = iter(_NUMBERS.findall(name))
            return re.sub("#", lambda _: next(numbers), form)
        if self.conversion is not None and any(old != self._forward(old) for old in self.read):
            return self.conversion.backward(name)
        return name

    def _forward(self, name: str) -> str:
        return self.conversion.forward(name) if self.conversion is not None else name

    @cached_property
    def _forms(self) -> dict[str, str]:
        """Transformers' name -> theirs, both with # for each number, where they have as many."""
        forms = {_form(self._forward(name)): _form(name) for name in self.read}
        return {new: old for new, old in forms.items() if new.count("#") == old.count("#")}

    def __str__(self) -> str:
        pairs = dict.fromkeys(
            (mine, other)
            for theirs, ours in self.read.items()
            if (mine := _inside(theirs)) is not None and (other := _inside(ours)) is not None and mine != other
        )
        shown = ", ".join(f"{theirs!r} read as {ours!r}" for theirs, ours in list(pairs)[:_SHOWN])
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        family = self.conversion.family if self.conversion is not None else ""
        return "; ".join(filter(None, (str(self.inner), f"inside of layers ({family}'s names) {shown}{more}")))


def match_names(
    theirs: Shapes, ours: Shapes, model_types: Iterable[str], wanted: Callable[[str], bool] = lambda name: True
) -> Names:
    """Match names by prefixes and, where names inside of layers are left over, by a conversion.

    `wanted` says of their names whether one without a match counts: not of what nobody builds.
    """
    plain = exchange(theirs, ours)
    if not (left := _left(theirs, ours, plain, wanted)):
        return plain
    candidates = [
        names for conversion in conversions(model_types, [*theirs, *ours])
        if (names := _converted(theirs, ours, conversion)) is not None
    ]  # fmt: skip
    lefts = [len(_left(theirs, ours, names, wanted)) for names in candidates]
    if not lefts or min(lefts) >= len(left):
        return plain
    best = [names for names, count in zip(candidates, lefts, strict=True) if count == min(lefts)]
    first = best[0]
    readings: dict[str, tuple[str, ...]] = {}
    for name in theirs:
        found = tuple(dict.fromkeys(names.ours(name) for names in best))
        if len(found) > 1:
            readings[name] = found
    if not readings:
        return first
    return ConvertedNames(
        first.stacks,
        first.others,
        {**first.ambiguous, **readings},
        first.conversion,
        first.inner,
        first.read,
        first.stored,
    )


def _left(theirs: Shapes, ours: Shapes, names: Names, wanted: Callable[[str], bool]) -> list[str]:
    """Their names inside of layers that are none of ours; experts, which may lie fused, are told by other means."""
    return [
        name
        for name in theirs
        if stack_of(name) is not None
        and ".experts." not in name
        and (names.ours(name) not in ours or names.is_ambiguous(name))
        and wanted(name)
    ]


def _converted(theirs: Shapes, ours: Shapes, conversion: Conversion) -> ConvertedNames | None:
    """The names by one conversion; None where it makes one name of several of ours."""
    stored = {conversion.forward(name): name for name in ours}
    if len(stored) != len(ours):
        return None
    forward = {name: conversion.forward(name) for name in theirs}
    counts = Counter(forward.values())
    inner = exchange({forward[name]: shape for name, shape in theirs.items()}, {n: ours[o] for n, o in stored.items()})
    ambiguous: dict[str, tuple[str, ...]] = {}
    for name, new in forward.items():
        if counts[new] > 1:
            ambiguous[name] = (inner.ours(new),)
    for path, places in inner.ambiguous.items():
        ambiguous[_stored_path(path, forward)] = tuple(
            _stored_path(p, {o: n for n, o in stored.items()}) for p in places
        )
    read = {name: stored.get(found, found) for name, new in forward.items() if (found := inner.ours(new)) in stored}
    return ConvertedNames(ambiguous=ambiguous, conversion=conversion, inner=inner, read=read, stored=stored)


def _stored_path(path: str, forward: Mapping[str, str]) -> str:
    """A stack of transformers' names as it is stored."""
    for old, new in forward.items():
        if (cut := stack_of(new)) is not None and cut[0] == path and (own := stack_of(old)) is not None:
            return own[0]
    return path


def _form(name: str) -> str:
    return _NUMBERS.sub("#", name)


def _inside(name: str) -> str | None:
    """What a name says inside of its layer, without the layer's number and `.weight`."""
    cut = stack_of(name)
    return cut[1].lstrip(".").partition(".")[2].removesuffix(".weight") if cut is not None else None
