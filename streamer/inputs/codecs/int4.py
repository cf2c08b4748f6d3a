"""Packed int4 of compressed-tensors, symmetric: eight values in an int32, a scale for each group of a row.

weight = (nibble - 8) * scale, with the first value in the lowest bits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshard.kernels.alignment.coded import Coded
from safeshard.streamer.inputs.codecs.base import Stored, block_max, expand, storable
from safeshard.streamer.inputs.codecs.nibbles import pack, unpack

TABLE = tuple(float(code - 8) for code in range(16))
PER_WORD = 8
TOP = 7


@dataclass(frozen=True)
class PackedInt4:
    """`group` columns share a scale; 0 means the whole row."""

    group: int
    packed = PER_WORD

    @property
    def name(self) -> str:
        return f"int4 in groups of {self.group}" if self.group else "int4 by row"

    @property
    def names(self) -> Mapping[str, str]:
        return {"values": ".weight_packed", "scales": ".weight_scale"}

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self.group or shape[1]

    def shapes(self, shape: tuple[int, int]) -> Mapping[str, Sequence[tuple[int, ...]]]:
        groups = shape[1] // (self.group or shape[1])
        return {"values": [(shape[0], shape[1] // PER_WORD)], "scales": [(shape[0], groups)]}

    def decode(self, stored: Stored) -> Tensor:
        assert sys.byteorder == "little"
        packed, scales = stored["values"], stored["scales"].float()
        values = unpack(packed.contiguous().view(torch.uint8), TABLE)
        values.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))
        return values

    def in_codes(self, dtype: str) -> bool:
        return False

    def coded(self, stored: Stored) -> Coded:
        raise NotImplementedError

    def encode(self, values: Tensor, like: Stored) -> dict[str, Tensor]:
        block = self.block((values.shape[0], values.shape[1]))
        scales = storable(block_max(values.abs(), block) / TOP, like["scales"].dtype)
        codes = (values / expand(scales.float(), *block, values.shape)).round_().clamp_(-TOP - 1, TOP) + (TOP + 1)
        words = pack(codes.to(torch.uint8)).contiguous().view(torch.int32)
        return {"values": words, "scales": scales.reshape(like["scales"].shape)}
