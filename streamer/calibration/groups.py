"""Linears that share an input, hence a factor, and the protocol of whatever gives the factors of a model."""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from safeshard.kernels.calibrated.factor import Factor, NonFiniteGramError, NotPositiveDefiniteError, safety_factor
from safeshard.kernels.calibrated.grams import Grams
from safeshard.kernels.calibrated.half import pack, unpack
from safeshard.manifests.errors import RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.device import wait
from safeshard.streamer.inputs.read import Read, Step
from safeshard.streamer.methods.base import Job


@dataclass(frozen=True)
class Saved:
    """A tensor that `calibrate` wrote: its place, and the BLAKE3 of its bytes."""

    read: Read
    blake3: str

    def load(self, loaded: Mapping[Hashable, Tensor], device: torch.device) -> Tensor:
        """The tensor on the device, of what was read to the host.

        Raises:
            RunError: it is not what was saved.
        """
        host = loaded[self.read.key]
        if hash_host(host) != self.blake3:
            place = f"{self.read.source.spec}/{self.read.ref.file}: {self.read.ref.name}"
            raise RunError(f"{place} is not what calibrate wrote", "calibrate again")
        return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class SavedFactor:
    """A factor in a file: the damping it took, and what was added to the diagonal, where an old file does not say."""

    saved: Saved
    damping: float
    added: float | None = None
    dead: tuple[int, ...] = ()

    def load(self, loaded: Mapping[Hashable, Tensor], device: torch.device) -> Factor:
        added = None
        if self.added is not None:
            added = torch.full((self.saved.read.ref.shape[0],), self.added, dtype=torch.float64)
            added[list(self.dead)] += 1
            added = added.to(device)
        return Factor(self.saved.load(loaded, device), self.damping, (self.damping,), added)


@dataclass(frozen=True)
class Needs:
    """What the jobs of a pass take of a group: the Grams themselves, factors at how many dampings.

    `solves` is whether closed forms are made of the Grams.
    """

    grams: bool = False
    dampings: int = 1
    solves: bool = True

    @property
    def keeps_gram(self) -> bool:
        """Whether the safe Gram outlives a factor that was made of it."""
        return self.grams or self.dampings > 1


@dataclass
class Group:
    """Linears with one input of `width` features, hence one Gram and one factor: made, or saved, or missing.

    `gram` is of the safe inputs, `kept` are of those whose outputs must stay, by role ("task", "keep"); I x I fp32,
    symmetric. Of saved ones `saved_grams` says where they lie, packed, by role.
    """

    modules: tuple[str, ...]
    width: int
    gram: Tensor | None = None  # until the factor takes its place, where nothing else needs it
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    saved: SavedFactor | None = None
    saved_grams: Mapping[str, Saved] = field(default_factory=dict)
    keeps: int = 0  # how many Grams of kept inputs are, or will be, there
    percdamp: float = 0.01  # of factors that are made of saved Grams, where a job does not ask for another
    reason: str = ""  # why there is no factor
    tokens: int | None = None  # of an expert: how many came to it
    shared: float = 0.0  # of an expert: the share of the Gram of all tokens in its own
    _made: tuple[float | None, Factor] | None = None
    _grams: Grams | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def is_saved(self) -> bool:
        """Whether it is read from files."""
        return self.saved is not None or bool(self.saved_grams)

    def resident(self, needs: Needs) -> int:
        """Bytes held while the layer is served: the Grams, then the factor."""
        matrices = 0 if self.is_saved else 1 + (needs.keeps_gram and needs.dampings > 0)
        kept = 0 if {"task", "keep"} & self.saved_grams.keys() else self.keeps
        return 4 * self.width**2 * (matrices + kept)

    def scratch(self, needs: Needs) -> int:
        """Bytes that making or reading factors, Grams and closed forms takes besides."""
        factor = 2 if not self.is_saved else 3 if not self.saved else 0
        unpacked = (1 if self.is_saved else 0) + self.keeps  # the safe Gram, and the sum of the others
        closed = unpacked + (2 if self.keeps else 1)  # in fp64, or in fp32
        return 4 * self.width**2 * max(factor if needs.dampings else 0, closed if needs.grams and needs.solves else 0)

    def reads(self, needs: Needs, asked: Collection[float | None]) -> list[Read]:
        """What is to be read for the jobs of a pass, which ask for factors at these dampings."""
        grams = needs.grams or any(not self._serves(percdamp) for percdamp in asked)
        found = [self.saved] if self.saved and any(map(self._serves, asked)) else []
        return [each.saved.read for each in found] + [each.read for each in self.saved_grams.values() if grams]

    def _serves(self, percdamp: float | None) -> bool:
        """Whether the saved factor is the one that is asked for."""
        return self.saved is not None and percdamp is None

    def serve(
        self, job: Job, needs: Needs, loaded: Mapping[Hashable, Tensor], device: torch.device
    ) -> Factor | Grams | str:
        """What a job takes: the Grams, or the factor at its damping, or why there is none."""
        if job.takes_grams:
            return self.grams(loaded, device)
        return self.factor(job.damping, needs, loaded, device)

    def factor(
        self, percdamp: float | None, needs: Needs, loaded: Mapping[Hashable, Tensor], device: torch.device
    ) -> Factor | str:
        """The factor, or why there is none. Whoever asks first makes it; others wait.

        Raises:
            RunError: the Gram is not finite, or what was saved is not what is read.
        """
        with self._lock:
            if self._made is not None and self._made[0] == percdamp:
                return self._made[1]
            if self.reason or (self.gram is None and not self.is_saved):
                return self.reason
            self._made = None
            if self.saved is not None and percdamp is None:
                made = self.saved.load(loaded, device)
            else:
                gram = self._safe(loaded, device)
                try:
                    made = self._make(gram, self.percdamp if percdamp is None else percdamp)
                except NotPositiveDefiniteError as error:
                    self.reason = f"its Gram matrix has no factor: {error}"
                    return self.reason
                finally:
                    if not needs.keeps_gram:
                        self.gram = None
            self._made = (percdamp, made)
            return made

    def grams(self, loaded: Mapping[Hashable, Tensor], device: torch.device) -> Grams:
        """The Grams, and what was made of them last.

        Raises:
            RunError: what was saved is not what is read.
        """
        with self._lock:
            if self._grams is None:
                kept = [*self.kept.values()]
                kept += [
                    unpack(self.saved_grams[role].load(loaded, device), self.width)
                    for role in ("task", "keep")
                    if role in self.saved_grams
                ]
                keep = None if not kept else kept[0] if len(kept) == 1 else kept[0] + kept[1]
                self._grams = Grams(self._safe(loaded, device), keep)
            return self._grams

    def packed(self) -> dict[str, Tensor]:
        """The Grams by half, on the host, by role."""
        grams = dict(self.kept) if self.gram is None else {"safe": self.gram, **self.kept}
        return {role: pack(gram).cpu() for role, gram in grams.items()}

    def forget(self) -> None:
        """Drop what was made of a step's tensors, whose buffer goes back."""
        if self.is_saved:
            self._made = self._grams = None

    def _safe(self, loaded: Mapping[Hashable, Tensor], device: torch.device) -> Tensor:
        if self.gram is not None:
            return self.gram
        return unpack(self.saved_grams["safe"].load(loaded, device), self.width)

    def _make(self, gram: Tensor, percdamp: float) -> Factor:
        try:
            made = safety_factor(gram, percdamp)
        except NonFiniteGramError as error:
            remedy = "look at the calibration data and the aligned checkpoint"
            raise RunError(f"{self.modules[0]}: {error}", remedy) from error
        wait(gram.device)  # other workers have streams of their own
        return made


def hash_host(tensor: Tensor) -> str:
    """BLAKE3 of the bytes of a tensor that lies on the host, contiguous."""
    return hash_bytes(tensor.view(-1).view(torch.uint8).numpy().data)


class FactorSource(Protocol):
    """Factors of an aligned model's linears.

    Attributes:
        modules: the linears it answers for.
        forward_bytes: what running a layer of the aligned model on one batch holds, besides its Grams; 0 if none runs.
        batch_bytes: what each further batch adds that runs at the same time; 0 if nothing runs.
        kept_bytes: of a layer's other weights, which stay while its experts are served; 0 without experts.
        layer_numbers: the decoder layer of each list that `planned` gives.
        ahead_bytes: host bytes of a layer's weights, read while a device computes the layer before; 0 if nothing runs.
        hidden_bytes: host bytes of the hidden states at most; 0 if nothing runs.
        bytes_read: of the aligned model so far, to run it.
    """

    modules: frozenset[str]
    forward_bytes: int
    batch_bytes: int
    kept_bytes: int
    ahead_bytes: int
    hidden_bytes: int

    @property
    def layer_numbers(self) -> Sequence[int]: ...

    @property
    def bytes_read(self) -> int: ...

    def inputs(self) -> dict[str, Input]:
        """What the manifest says of it, by role."""

    def notes(self) -> dict[str, tuple[str, ...]]:
        """By source of data: what was done otherwise than it or the options say."""

    def planned(self) -> Sequence[Sequence[Group]]:
        """The groups of each decoder layer as far as headers tell, without Grams: none of them shared, if one runs.

        A layer's experts come before its other linears, in lists of their own.
        """

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        """The lists of `planned`, in order, at least those of decoder layers from `saved.first` on.

        Clear one, and be through with its modules, before asking for the next.

        Args:
            budget: host bytes for hidden states; beyond them they lie in a file in the first of `saved.folders`.
            saved: where hidden states are saved, and found.
            workers: batches that run at once.
        """


def resident_bytes(source: FactorSource, needs: Needs) -> int:
    """What a layer's Grams, and the factors that take their place, hold at most where the arithmetic is done."""
    return max((sum(group.resident(needs) for group in layer) for layer in source.planned()), default=0)


def device_bytes(source: FactorSource, steps: Iterable[Step], needs: Needs) -> int:
    """What calibrating and serving layer by layer holds at most where the arithmetic is done, one step at a time."""
    costs = (source.kept_bytes + step.cost for step in steps)
    return resident_bytes(source, needs) + max([source.forward_bytes, *costs])
