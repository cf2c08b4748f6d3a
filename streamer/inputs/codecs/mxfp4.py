"""MXFP4 (OCP Microscaling Formats 1.0): 32 values of four bits (E2M1) share a power of two, 2^(s - 127).

GPT-OSS stores a tensor `_blocks` (... x groups x 16 bytes) and one `_scales`; compressed-tensors `weight_packed`
(O x I/2 bytes) and `weight_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import safeshard.kernels.ground.first_calls  # noqa: F401
from safeshard.kernels.alignment.coded import Coded
from safeshard.streamer.inputs.codecs.base import Stored, block_max, expand
from safeshard.streamer.inputs.codecs.nibbles import pack, unpack

GROUP = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = _POSITIVE + tuple(-value for value in _POSITIVE)
# Between neighbours; one in the middle goes to the even code.
_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(_POSITIVE))
_SCALES = torch.cat([torch.exp2(torch.arange(-127, 128, dtype=torch.float64)), torch.tensor([torch.nan])]).float()


@dataclass(frozen=True)
class Mxfp4:
    """Values in bytes, the low half first; scales are exponents in a byte."""

    values: str = ".weight_packed"
    scales: str = ".weight_scale"
    name = "MXFP4"
    packed = 2

    @property
    def names(self) -> Mapping[str, str]:
        return {"values": self.values, "scales": self.scales}

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, GROUP

    def shapes(self, shape: tuple[int, int]) -> Mapping[str, Sequence[tuple[int, ...]]]:
        groups = shape[1] // GROUP
        return {"values": [(shape[0], groups, GROUP // 2), (shape[0], shape[1] // 2)], "scales": [(shape[0], groups)]}

    def decode(self, stored: Stored) -> Tensor:
        scales = stored["scales"].view(torch.uint8)
        values = unpack(stored["values"].view(torch.uint8).reshape(len(scales), -1), TABLE)
        factors = _SCALES.to(scales.device)[scales.int()]
        values.view(*scales.shape, GROUP).mul_(factors.unsqueeze(-1))
        return values

    def in_codes(self, dtype: str) -> bool:
        return True

    def coded(self, stored: Stored) -> Coded:
        scales = stored["scales"].view(torch.uint8)
        return Coded("e2m1", stored["values"].view(torch.uint8).reshape(len(scales), -1), scales, (1, GROUP))

    def encode(self, values: Tensor, like: Stored) -> dict[str, Tensor]:
        largest = block_max(values.abs(), self.block((values.shape[0], values.shape[1]))).double()
        exponents = torch.ceil(torch.log2(largest / TABLE[7])).clamp(-127, 127)
        scaled = values.double() / expand(torch.exp2(exponents), 1, GROUP, values.shape)
        codes = _nearest(scaled.abs()) | torch.signbit(values).to(torch.uint8) << 3
        scales = (exponents + 127).to(torch.uint8)
        return {
            "values": pack(codes).view(like["values"].dtype).reshape(like["values"].shape),
            "scales": scales.view(like["scales"].dtype).reshape(like["scales"].shape),
        }


def _nearest(magnitudes: Tensor) -> Tensor:
    """The code of the nearest E2M1 value, ties to even."""
    middles = torch.tensor(_MIDDLES, dtype=magnitudes.dtype, device=magnitudes.device)
    below = torch.searchsorted(middles, magnitudes)  # a tie goes down
    above = torch.searchsorted(middles, magnitudes, right=True)
    return torch.where(below % 2 == 0, below, above).to(torch.uint8)
