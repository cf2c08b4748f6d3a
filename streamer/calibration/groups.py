"""Linears that share an input, hence a factor, and the protocol of whatever gives the factors of a model."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from safeshard.kernels.factor import Factor, NonFiniteGramError, NotPositiveDefiniteError, safety_factor
from safeshard.manifests.errors import RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.device import wait
from safeshard.streamer.inputs.read import Read, Step


@dataclass(frozen=True)
class Saved:
    """A factor in a file: its place, the damping it took, and the BLAKE3 of its bytes."""

    read: Read
    damping: float
    blake3: str


@dataclass
class Group:
    """Linears with one input of `width` features, hence one factor: made of the Gram, or saved, or missing."""

    modules: tuple[str, ...]
    width: int
    gram: Tensor | None = None  # I x I fp32, until the factor takes its place
    saved: Saved | None = None
    reason: str = ""  # why there is no factor
    _made: Factor | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def resident(self) -> int:
        """Bytes held while the layer is served: the Gram, then the factor."""
        return 4 * self.width**2 if self.saved is None else 0

    @property
    def scratch(self) -> int:
        """Bytes that making or reading the factor takes besides."""
        return 4 * self.width**2 * (2 if self.saved is None else 0)

    def factor(self, percdamp: float, loaded: Mapping[Hashable, Tensor], device: torch.device) -> Factor | str:
        """The factor, or why there is none. Whoever asks first makes it; others wait.

        Raises:
            RunError: the Gram is not finite, or the saved factor is not what was saved.
        """
        if self.saved is not None:
            return _read_factor(self.saved, loaded[self.saved.read.key], device)
        with self._lock:
            if self.gram is not None:
                self._make(self.gram, percdamp)
                self.gram = None
        return self._made or self.reason

    def _make(self, gram: Tensor, percdamp: float) -> None:
        try:
            self._made = safety_factor(gram, percdamp)
            wait(gram.device)  # other workers have streams of their own
        except NotPositiveDefiniteError as error:
            self.reason = f"its Gram matrix has no factor: {error}"
        except NonFiniteGramError as error:
            remedy = "look at the calibration data and the aligned checkpoint"
            raise RunError(f"{self.modules[0]}: {error}", remedy) from error


def _read_factor(saved: Saved, host: Tensor, device: torch.device) -> Factor:
    if hash_factor(host) != saved.blake3:
        place = f"{saved.read.source.spec}/{saved.read.ref.file}: {saved.read.ref.name}"
        raise RunError(f"{place} is not what calibrate wrote", "calibrate again")
    return Factor(host.to(device, non_blocking=True), saved.damping, (saved.damping,))


def hash_factor(u: Tensor) -> str:
    """BLAKE3 of a factor's bytes; it lies on the host, contiguous."""
    return hash_bytes(u.view(-1).view(torch.uint8).numpy().data)


class FactorSource(Protocol):
    """Factors of an aligned model's linears.

    Attributes:
        modules: the linears it answers for.
        forward_bytes: what running a layer of the aligned model on one batch holds, besides its Grams; 0 if none runs.
        batch_bytes: what each further batch adds that runs at the same time; 0 if nothing runs.
        hidden_bytes: host bytes of the hidden states at most; 0 if nothing runs.
        bytes_read: of the aligned model so far, to run it.
    """

    bytes_read: int
    modules: frozenset[str]
    forward_bytes: int
    batch_bytes: int
    hidden_bytes: int

    def inputs(self) -> dict[str, Input]:
        """What the manifest says of it, by role."""

    def planned(self) -> Sequence[Sequence[Group]]:
        """The groups of each decoder layer as far as headers tell, without Grams: none of them shared, if one runs."""

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        """The groups of each decoder layer, in order, at least from `saved.first` on.

        Clear one, and be through with its modules, before asking for the next.

        Args:
            budget: host bytes for hidden states; beyond them they lie in a file in the first of `saved.folders`.
            saved: where hidden states are saved, and found.
            workers: batches that run at once.
        """


def resident_bytes(source: FactorSource) -> int:
    """What a layer's Grams, and the factors that take their place, hold at most where the arithmetic is done."""
    return max((sum(group.resident for group in layer) for layer in source.planned()), default=0)


def device_bytes(source: FactorSource, steps: Iterable[Step]) -> int:
    """What calibrating and serving layer by layer holds at most where the arithmetic is done, one step at a time."""
    return resident_bytes(source) + max([source.forward_bytes, *(step.cost for step in steps)])
