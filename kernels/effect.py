"""What an edit leaves of a fine-tuned delta D: the inner products of D and of the delta N that is written.

    |N| / |D|                       the share of the delta's norm that is left
    <N, D> / (|N| |D|)              the cosine between the two

For LoRA deltas D = s B A and N = t B' A' nothing of their shape is formed:

    |D|^2  = s^2 sum((B^T B) * (A A^T))
    <N, D> = s t sum((B^T B') * (A A'^T))
    |N|^2  = t^2 sum((B'^T B') * (A' A'^T))

Shapes: weights, D and N are O x I; B is O x r, A is r x I; B' and A' have a rank of their own.

Example: D = [[3, 4]] and N = [[3, 0]] give |D|^2 = 25, <N, D> = 9 and |N|^2 = 9: 60 % of the norm, cosine 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a factor, taken to fp64 at a time: on the CPU in its cache, on a device in one launch.
ELEMENTS, DEVICE_ELEMENTS = 1 << 15, 1 << 24

# Entries of a weight that are measured together: on the CPU they stay in a core's cache.
PIECE, DEVICE_PIECE = 1 << 14, 1 << 20
WHOLE = 1 << 18  # entries up to which a weight is always measured throughout


class Products(NamedTuple):
    """Inner products of the delta that came in, D, and of the one written, N; 0-d fp64 tensors, or their sums."""

    before: Tensor
    """|D|^2"""
    after: Tensor
    """|N|^2"""
    inner: Tensor
    """<N, D>"""


def _gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """x^T y in fp64, of two factors with the same rows; of one alone x^T x."""
    other = x if y is None else y
    total = torch.zeros((x.shape[1], other.shape[1]), dtype=torch.float64, device=x.device)
    elements = ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    rows = max(1, elements // max(1, x.shape[1], other.shape[1]))
    for start in range(0, len(x), rows):
        left = x[start : start + rows].double()
        total.addmm_(left.T, left if y is None else y[start : start + rows].double())
    return total


def lora_products(a: Tensor, b: Tensor, scaling: float, new_a: Tensor, new_b: Tensor, new_scaling: float) -> Products:
    """The products of D = scaling B A and N = new_scaling B' A', in fp64 throughout.

    Args:
        a, b: r x I and O x r, any float dtype.
        new_a, new_b: r' x I and O x r'.
    """

    gram_a, gram_b = _gram(a.T), _gram(b)
    before = (gram_a * gram_b).sum().clamp_min(0) * scaling**2
    if new_a is a and new_b is b and new_scaling == scaling:
        return Products(before, before, before)
    both_a, after_a = (gram_a, gram_a) if new_a is a else (_gram(a.T, new_a.T), _gram(new_a.T))
    both_b, after_b = (gram_b, gram_b) if new_b is b else (_gram(b, new_b), _gram(new_b))
    after = (after_a * after_b).sum().clamp_min(0) * new_scaling**2
    return Products(before, after, (both_a * both_b).sum() * (scaling * new_scaling))


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
