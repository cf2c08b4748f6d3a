"""What every codec of a quantised format does: decode a weight, encode one, and change only the blocks that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from safeshard.kernels.alignment.coded import Coded

TILE = 1 << 16  # elements decoded at a time: their intermediate forms stay in a core's L2 cache
Stored = Mapping[str, Tensor]
"""A weight as it is stored, by part: "values" (integers, fp8 or packed bytes, O rows) and "scales"."""


class Codec(Protocol):
    """One quantised format of an O x I weight, whose values share a scale block by block.

    Attributes:
        name: as people know the format.
        names: part -> the ending of its tensor's name, after the module's: `.weight_scale_inv`.
        packed: values in one element of "values".
    """

    @property
    def name(self) -> str: ...

    @property
    def names(self) -> Mapping[str, str]: ...

    @property
    def packed(self) -> int: ...

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale, of a weight of `shape`; the last of a row or column may be ragged."""

    def shapes(self, shape: tuple[int, int]) -> Mapping[str, Sequence[tuple[int, ...]]]:
        """The shapes that a part's tensor may have for a weight of `shape`."""

    def decode(self, stored: Stored) -> Tensor:
        """The weight, O x I fp32: each value times its scale, rounded once."""

    def in_codes(self, dtype: str) -> bool:
        """Whether values of a safetensors dtype can be multiplied with as they are stored, decoded tile by tile."""

    def coded(self, stored: Stored) -> Coded:
        """The weight for those that decode it, where `in_codes`."""

    def encode(self, values: Tensor, like: Stored) -> dict[str, Tensor]:
        """`values` (O x I fp32, finite) in this format, each part of the dtype and shape that `like` has."""


@dataclass(frozen=True)
class Encoded:
    """A weight encoded anew where it changed: its parts, its blocks, those changed, and what that cost.

    `error` is |decoded - wanted|^2 and `norm` |wanted|^2, both over the changed blocks.
    """

    stored: dict[str, Tensor]
    blocks: int
    changed: int
    error: float
    norm: float


def reencode(codec: Codec, values: Tensor, known: Sequence[Stored]) -> Encoded:
    """`values` (O x I fp32) encoded. A block that equals one of `known`, bit for bit once decoded, has its bytes.

    The first of `known` is the weight that is edited: what differs from it counts as changed.
    """
    rows, columns = block = codec.block((values.shape[0], values.shape[1]))
    result = {part: tensor.clone() for part, tensor in known[0].items()}
    changed = ~_equal_blocks(values, codec.decode(known[0]), block)
    left = changed.clone()
    for other in known[1:]:
        if left.any():
            equal = left & _equal_blocks(values, codec.decode(other), block)
            _take(codec, result, other, equal, rows, columns)
            left &= ~equal
    error = norm = 0.0
    if left.any():
        _take(codec, result, codec.encode(values, known[0]), left, rows, columns)
    if changed.any():
        mask = expand(changed, rows, columns, values.shape)
        wanted = values[mask]
        error = float((codec.decode(result)[mask] - wanted).double().square().sum())
        norm = float(wanted.double().square().sum())
    return Encoded(result, changed.numel(), int(changed.sum()), error, norm)


def _equal_blocks(a: Tensor, b: Tensor, block: tuple[int, int]) -> Tensor:
    """For each block whether all of its bits are equal."""
    return block_max(a.view(torch.int32).ne(b.view(torch.int32)).to(torch.uint8), block).eq(0)


def _take(codec: Codec, result: dict[str, Tensor], other: Stored, mask: Tensor, rows: int, columns: int) -> None:
    """Copy the blocks in `mask` from `other`."""
    for part, tensor in result.items():
        if part == "values":
            flat = tensor.view(tensor.shape[0], -1)
            chosen = expand(mask, rows, columns // codec.packed, flat.shape)
        else:
            flat, chosen = tensor.view(-1), mask.reshape(-1)
        flat.view(_bits(flat))[chosen] = other[part].reshape(flat.shape).view(_bits(flat))[chosen]


def _bits(tensor: Tensor) -> torch.dtype:
    """An integer type of the same size, which indexing takes for any dtype."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]


def expand(blocks: Tensor, rows: int, columns: int, shape: Sequence[int]) -> Tensor:
    """Each block's value for each of its elements."""
    wide = blocks if columns == 1 else blocks.repeat_interleave(columns, 1)
    return (wide if rows == 1 else wide.repeat_interleave(rows, 0))[: shape[0], : shape[1]]


def block_max(values: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest value of each block."""
    (rows, columns), (height, width) = block, values.shape
    tall, wide = -(-height // rows), -(-width // columns)
    padded = torch.nn.functional.pad(values, (0, wide * columns - width, 0, tall * rows - height))
    return padded.view(tall, rows, wide, columns).amax((1, 3))


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: none is zero, for one of zeros or of values too small for `dtype`, nor infinite."""
    rounded = scales.to(dtype)
    if dtype == torch.float16:
        rounded = rounded.clamp(max=torch.finfo(dtype).max)
    return torch.where(rounded.float() > 0, rounded.float(), 1.0).to(dtype)
