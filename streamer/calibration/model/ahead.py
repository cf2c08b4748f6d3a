"""The weights of the next decoder layer, read into pinned memory while a device computes the layer before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from safeshard.streamer.pinned import host_memory

ALIGN = 64
Room = Callable[[int], Tensor]


def fresh(nbytes: int) -> Tensor:
    """Memory of its own."""
    return torch.empty(nbytes, dtype=torch.uint8)


def aligned_size(nbytes: int) -> int:
    """What a tensor takes of the memory that is read ahead into."""
    return -(-nbytes // ALIGN) * ALIGN


class Load(Protocol):
    """Gives a tensor of the checkpoint by its name, on the host, in memory that `room` gives (nbytes -> uint8)."""

    def __call__(self, name: str, room: Room = fresh) -> Tensor: ...


class Ahead:
    """A `Load` for one layer after the other. Its memory is one layer's: that is used when the next is announced.

    Tensors that were not announced, or that find no room, are loaded when they are asked for.
    """

    def __init__(self, load: Load, nbytes: int) -> None:
        self._load = load
        self._memory = host_memory(nbytes, pinned=True)
        self._used = 0
        self._coming: dict[str, Future[Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "weights")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, layers can be announced."""
        with self._thread:
            try:
                yield
            finally:
                for future in self._coming.values():
                    future.cancel()

    def announce(self, names: Sequence[str]) -> None:
        """Begin to read the next layer's tensors, in this order."""
        self._used = 0
        self._coming = {name: self._thread.submit(self._load, name, self._room) for name in names}

    def __call__(self, name: str, room: Room = fresh) -> Tensor:
        coming = self._coming.pop(name, None)
        return coming.result() if coming is not None else self._load(name, room)

    def _room(self, nbytes: int) -> Tensor:
        begin, end = self._used, self._used + nbytes
        if end > self._memory.numel():
            return fresh(nbytes)
        self._used += aligned_size(nbytes)
        return self._memory[begin:end]
