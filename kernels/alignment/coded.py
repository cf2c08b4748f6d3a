"""A quantised weight in its codes, decoded region by region: weight = value of the code * scale.

E4M3 (fp8) is read by its bits: shifted into a half, whose exponent has a bias of 15 for 7, it is 2^-8 of its value.
E2M1 (MXFP4, OCP Microscaling Formats 1.0) is so 2^-14 of it; its scales are exponents, 2^(s - 127).

Shapes: the weight is O x I. E4M3 codes are O x I, E2M1 codes O x I/2 bytes, the low half first.

Example: the E4M3 code 0x38 is 1.0, as the half 0x1C00 it is 2^-8; with a scale of 0.5 the weight is 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

import safeshard.kernels.ground.first_calls  # noqa: F401
from safeshard.kernels.ground.scratch import scratch

Kind = Literal["e4m3", "e2m1"]
E2M1_COLUMNS = 32  # that share a scale
SHIFT = {"e4m3": 2.0**8, "e2m1": 2.0**14}  # what the halves are to be multiplied with
LARGE = {"e4m3": 1e36, "e2m1": 240}  # scales above are no numbers any more times SHIFT
_WHOLE = slice(None)


@dataclass(frozen=True)
class Coded:
    """An O x I weight in its codes; both tensors on one device, of any strides.

    Attributes:
        kind: e4m3 or e2m1.
        codes: uint8, O x I of e4m3, O x I/2 of e2m1.
        scales: of e4m3 fp32, of e2m1 uint8; one for each block, a row and a column a block.
        block: rows and columns that share a scale; the last of a row or column may be ragged.

    Raises:
        ValueError: dtypes or shapes do not fit.
    """

    kind: Kind
    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        dtypes = torch.uint8, torch.uint8 if self.kind == "e2m1" else torch.float32
        if (self.codes.dtype, self.scales.dtype) != dtypes or self.codes.ndim != 2 or min(self.block) < 1:
            raise ValueError(f"{self.kind} needs codes and scales of {dtypes}, and blocks, got {self}")
        grid = tuple(-(-size // step) for size, step in zip(self.shape, self.block, strict=True))
        if self.scales.shape != grid:
            raise ValueError(f"{self.kind} of {self.shape} in blocks of {self.block} has {grid} scales, got {self}")
        if self.kind == "e2m1" and self.block != (1, E2M1_COLUMNS):
            raise ValueError(f"e2m1 has a scale for each {E2M1_COLUMNS} of a row, got {self}")

    def __repr__(self) -> str:
        return f"{self.kind} {tuple(self.codes.shape)} {self.codes.dtype}, scales {tuple(self.scales.shape)}"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * (2 if self.kind == "e2m1" else 1)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def rows(self, start: int, stop: int, step: int = 1) -> Coded:
        """Some rows; neighbours from the border of a block on, unless a block is one row high, or all rows."""
        height = self.block[0]
        some = (slice(start, stop, step), slice(start // height, -(-stop // height), step))
        return replace(self, codes=self.codes[some[0]], scales=self.scales[some[1]])

    def whole(self) -> Tensor:
        """The weight, O x I fp32, each value times its scale, rounded once."""
        return self.decode(_WHOLE, torch.empty(self.shape, device=self.device))

    def decode(self, columns: slice, out: Tensor) -> Tensor:
        """Some columns of the weight into `out` (O x their number, fp32), which is returned.

        `columns` starts and ends at the border of a block, or at the weight's.
        """
        start, stop, _ = columns.indices(self.shape[1])
        height, width = self.block
        if self.kind == "e4m3":
            _widen_e4m3(self.codes[:, start:stop], out, self._may_be_nan)
        else:
            _widen_e2m1(self.codes[:, start // 2 : stop // 2], out)
        scales = self._numbers[:, start // width : -(-stop // width)]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(width, 1)[:, : stop - start]
        if height == 1 or len(scales) == 1:
            out.mul_(scales)
        elif len(out) % height == 0:
            out.view(len(scales), height, -1).mul_(scales.unsqueeze(1))
        else:
            for row, top in zip(scales, range(0, len(out), height), strict=True):
                out[top : top + height].mul_(row)
        return out if self._exact else out.mul_(SHIFT[self.kind])

    @cached_property
    def _exact(self) -> bool:
        """Whether scales can be multiplied with SHIFT, which spares a pass: almost always, and looked for on a CPU."""
        return not self.codes.is_cuda and not bool((self.scales > LARGE[self.kind]).any())

    @cached_property
    def _may_be_nan(self) -> bool:
        """Whether to look for NaN among codes of E4M3: all are looked through once, in order; none of a device's."""
        return self.codes.is_cuda or _has_nan(self.codes)

    @cached_property
    def _numbers(self) -> Tensor:
        """Scales in fp32, times SHIFT where that is exact."""
        if self.kind == "e4m3":
            return self.scales * SHIFT["e4m3"] if self._exact else self.scales
        numbers = torch.exp2(self.scales.double() - 127).masked_fill_(self.scales == 255, torch.nan)
        return (numbers * SHIFT["e2m1"] if self._exact else numbers).float()


Weight = Tensor | Coded


def decoded(weight: Weight) -> Tensor:
    """A weight as a tensor, O x I."""
    return weight.whole() if isinstance(weight, Coded) else weight


def widen_e4m3(codes: Tensor, out: Tensor) -> Tensor:
    """The values of codes (uint8, on a CPU) into `out` (fp32), which is returned.

    Eight times as fast as torch's own conversion.
    """
    _widen_e4m3(codes, out, _has_nan(codes))
    return out.mul_(SHIFT["e4m3"])


def _has_nan(codes: Tensor) -> bool:
    """Whether there is E4M3's NaN: the largest number with a sign, or without."""
    return bool(codes.numel()) and (int(codes.view(torch.int8).max()) == 0x7F or int(codes.max()) == 0xFF)


def _widen_e4m3(codes: Tensor, out: Tensor, may_be_nan: bool) -> None:
    """The values of codes, but for SHIFT; nobody waits for a device."""
    signed = codes.view(torch.int8)
    bits = scratch("bits", codes.numel(), torch.int16, codes.device).view(codes.shape).copy_(signed)
    out.copy_(bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16))
    if may_be_nan:
        out.masked_fill_(signed.bitwise_and(0x7F) == 0x7F, torch.nan)


def _widen_e2m1(codes: Tensor, out: Tensor) -> None:
    """The values of both codes of each byte, but for SHIFT."""
    wide = codes.to(torch.int16)
    for first, low in ((0, wide), (1, wide.bitwise_right_shift(4))):
        bits = low.bitwise_and(7).bitwise_left_shift_(9).bitwise_or_(low.bitwise_and(8).bitwise_left_shift_(12))
        out[:, first::2].copy_(bits.view(torch.float16))
