"""One architecture under other prefixes: how another input's names read in the aligned checkpoint.

A model class that wraps a language model, a release of transformers, or a save of the language model alone changes what
stands before the layers: `model.language_model.layers`, `language_model.model.layers`, `model.layers`. So one exchange
is looked for a stack of layers, and the layers' own names never change. Two stacks may hold layers of the same names,
as a vision tower and a language model do: they are told apart by the part of the model that a whole path names, by the
shapes, and by the words that two paths share. What that leaves open is not guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from safeshard.streamer.inputs.names.parts import part_of, stack_of

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Names:
    """Their names and ours, for what is called otherwise.

    Attributes:
        stacks: their path of a stack of layers -> ours, of every stack that was found, also under the same path.
        others: their name -> ours, of what stands outside of layers and is called otherwise.
        ambiguous: their path or name -> ours that it may as well be.
    """

    stacks: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def ours(self, theirs: str) -> str:
        """The aligned checkpoint's name."""
        if (cut := stack_of(theirs)) is None:
            return self.others.get(theirs, theirs)
        return self.stacks.get(cut[0], cut[0]) + cut[1]

    def is_ambiguous(self, theirs: str) -> bool:
        cut = stack_of(theirs)
        return (cut[0] if cut else theirs) in self.ambiguous

    def theirs(self, ours: str) -> str:
        """The other input's name of a tensor that it may lack."""
        if ours in self._theirs:
            return self._theirs[ours]
        if (cut := stack_of(ours)) is not None:
            return self._their_stacks.get(cut[0], cut[0]) + cut[1]
        for old, new in self.prefixes:
            if new and ours.startswith(new):
                return old + ours.removeprefix(new)
        return ours

    @cached_property
    def _theirs(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.others.items()}

    @cached_property
    def _their_stacks(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.stacks.items()}

    @cached_property
    def prefixes(self) -> list[tuple[str, str]]:
        """Their prefix and ours, each pair once, of the stacks that are called otherwise; the longest first."""
        pairs = {_differing(old, new) for old, new in self.stacks.items() if old != new}
        return sorted(pairs, key=lambda pair: (-len(pair[0]), pair))

    def __str__(self) -> str:
        read = [f"{old!r} read as {new!r}" for old, new in self.prefixes]
        for old, new in sorted(self.others.items()):
            if not any(old.startswith(a) and new == b + old.removeprefix(a) for a, b in self.prefixes):
                read.append(f"{old.removesuffix('.weight')!r} read as {new.removesuffix('.weight')!r}")
        return "module prefix " + ", ".join(read) if read else ""


def exchange(theirs: Shapes, ours: Shapes) -> Names:
    """Match names by whole paths and shapes; every stack of theirs that ours has under the same path stays as it is."""
    their_stacks = {path: _telling(tails) for path, tails in _stacks(theirs).items()}
    our_stacks = _stacks(ours)
    stacks = {path: path for path, tails in their_stacks.items() if _common(tails, our_stacks.get(path, {}))}
    ambiguous: dict[str, tuple[str, ...]] = {}
    free = {path: tails for path, tails in our_stacks.items() if path not in stacks}
    for path, tails in their_stacks.items():
        if path not in stacks:
            found = _nearest(path, tails, free)
            if len(found) == 1:
                stacks[path] = found[0]
            elif found:
                ambiguous[path] = tuple(found)
    for path, rivals in _claimed_twice(stacks).items():
        for rival in rivals:
            del stacks[rival]
            ambiguous[rival] = (path,)
    names = Names(stacks, ambiguous=ambiguous)
    return Names(stacks, _others(names, theirs, ours), ambiguous=ambiguous)


def _stacks(shapes: Shapes) -> dict[str, dict[str, Shape]]:
    """Path -> what stands in its layers: the rest of each name, and its shape."""
    stacks: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if (cut := stack_of(name)) is not None:
            stacks.setdefault(cut[0], {})[cut[1]] = shape
    return stacks


def _telling(tails: Shapes) -> Shapes:
    """What tells a stack: experts, thousands of tensors here and one there, only where there is nothing else."""
    return {tail: shape for tail, shape in tails.items() if ".experts." not in tail} or tails


def _common(theirs: Shapes, ours: Shapes) -> int:
    return sum(tail in ours for tail in theirs)


def _nearest(path: str, tails: Shapes, stacks: Mapping[str, Shapes]) -> list[str]:
    """Our stacks that theirs may be: of the same part of a model, by shapes if any fit, then by words of the path."""
    part = part_of(path)
    rivals = {ours: known for ours, known in stacks.items() if part_of(ours) == part}
    fitting = {ours: sum(known.get(tail) == shape for tail, shape in tails.items()) for ours, known in rivals.items()}
    named = {ours: _common(tails, known) for ours, known in rivals.items()}
    for counts in (fitting, named):  # where no shape fits, a name alone leads to the offence that says so
        most = max(counts.values(), default=0)
        if 2 * most > len(tails):
            best = [ours for ours, count in counts.items() if count == most]
            return _most_shared(path, best)
    return []


def _most_shared(path: str, rivals: Iterable[str]) -> list[str]:
    words = Counter(path.split("."))
    shared = {ours: (words & Counter(ours.split("."))).total() for ours in rivals}
    most = max(shared.values())
    return [ours for ours, count in shared.items() if count == most]


def _claimed_twice(stacks: Mapping[str, str]) -> dict[str, list[str]]:
    claims: dict[str, list[str]] = {}
    for theirs, ours in stacks.items():
        claims.setdefault(ours, []).append(theirs)
    return {ours: rivals for ours, rivals in claims.items() if len(rivals) > 1}


def _others(names: Names, theirs: Shapes, ours: Shapes) -> dict[str, str]:
    """What stands outside of layers and is called otherwise: by the prefixes of the stacks, else by the longest tail.

    A tail counts from two parts on, or where one name is the other's tail as a whole.
    """
    found: dict[str, str] = {}
    free = {name for name in ours if stack_of(name) is None and name not in theirs}
    for name in sorted(theirs):
        if stack_of(name) is not None or name in ours:
            continue
        moved = (new + name.removeprefix(old) for old, new in names.prefixes if name.startswith(old))
        if place := next((each for each in moved if each in free), None):
            found[name] = place
            free.discard(place)
    tails: dict[str, list[str]] = {}
    for name in sorted(free):
        tails.setdefault(_tail(name), []).append(name)
    for name in sorted(theirs):
        if stack_of(name) is not None or name in ours or name in found:
            continue
        rivals = [r for r in tails.get(_tail(name), ()) if r in free and _fit(name, theirs[name], r, ours[r])]
        lengths = {rival: _shared_tail(name, rival) for rival in rivals}
        best = [rival for rival in rivals if lengths[rival] == max(lengths.values())]
        if len(best) == 1:
            found[name] = best[0]
            free.discard(best[0])
    return found


def _fit(theirs: str, their_shape: Shape, ours: str, our_shape: Shape) -> bool:
    """Whether two names outside of layers may be one tensor's; a vocabulary may have other rows."""
    whole = f".{ours}".endswith(f".{theirs}") or f".{theirs}".endswith(f".{ours}")
    alike = whole or _shared_tail(theirs, ours) > 2
    return alike and part_of(theirs) == part_of(ours) and their_shape[1:] == our_shape[1:]


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _shared_tail(one: str, other: str) -> int:
    """How many parts two names share at their ends."""
    parts, others = one.split(".")[::-1], other.split(".")[::-1]
    return next(
        (i for i, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), min(len(parts), len(others))
    )


def _differing(old: str, new: str) -> tuple[str, str]:
    """Two dotted names without the end that they share, each with its last dot."""
    shared = _shared_tail(old, new)
    heads = (name.split(".")[: len(name.split(".")) - shared] for name in (old, new))
    before, after = ("".join(f"{part}." for part in head) for head in heads)
    return before, after
