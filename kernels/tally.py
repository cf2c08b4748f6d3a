"""What an edit leaves of a full weight's delta, measured tile by tile as it is written; of a large one a part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safeshard.kernels.effect import Products

# Entries of a weight that are measured together: on the CPU they stay in a core's cache.
PIECE, DEVICE_PIECE = 1 << 14, 1 << 20
WHOLE = 1 << 18  # entries up to which a weight is always measured throughout


class Tally:
    """Adds up the products of one weight from its parts, as they pass.

    Sums over a piece are fp32, the others fp64. On the CPU, of a weight of more than `WHOLE` entries one piece of
    `every` (a power of two) is measured, for all of it: another one of each group, so that no pattern of heads or
    experts is met again; which ones, the weight's size alone decides.
    """

    def __init__(self, numel: int, every: int, device: torch.device) -> None:
        self._numel, self._offset, self._measured, self._device = numel, 0, 0, device
        self._piece = PIECE if device.type == "cpu" else DEVICE_PIECE
        self._every = every if device.type == "cpu" and numel > WHOLE else 1
        self._sums: list[Tensor] = []
        self._buffers: Tensor | None = None

    def take(self, count: int) -> Iterator[tuple[int, int]]:
        """Which of the next `count` entries, in row-major order, are to be measured; from 0 on."""
        start, self._offset = self._offset, self._offset + count
        group = self._piece * self._every
        for index in range(start // group, -(-self._offset // group)):
            first = index * group + 5 * index % self._every * self._piece  # steps of 5 come through all places
            lo, hi = max(first, start), min(first + self._piece, self._offset)
            if lo < hi:
                yield lo - start, hi - start

    def add(self, aligned: Tensor, tuned: Tensor, written: Tensor, *, tuned_is_delta: bool = False) -> None:
        """Measure some entries, as `take` cuts them: vectors of any float dtype. `tuned` may be D itself."""
        count = len(aligned)
        if self._buffers is None:  # kept, since the system would hand out and take back fresh pages each time
            self._buffers = torch.empty((3, min(self._piece, self._numel)), device=self._device)
        base, delta, new = (buffer[:count] for buffer in self._buffers)
        base.copy_(aligned)
        delta.copy_(tuned)
        new.copy_(written).sub_(base)
        if not tuned_is_delta:
            delta.sub_(base)
        self._sums += torch.dot(delta, delta), torch.dot(new, new), torch.dot(delta, new)
        self._measured += count

    def products(self) -> Products:
        """The products of the whole weight, once all of it has passed."""
        if not self._measured:
            return Products(*torch.zeros(3, dtype=torch.float64))
        sums = torch.stack(self._sums).view(-1, 3).double().sum(0)
        return Products(*(sums * (self._numel / self._measured)))
