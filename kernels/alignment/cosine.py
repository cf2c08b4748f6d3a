"""The cosine of a gate from its sums, and whether fp32 held what they are made of.

Squares of fp32 numbers below 1e-19 or above 1e19 leave fp32. Where they do, a gate is computed again from operands that
are scaled by powers of two, which changes no bit of a cosine.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import safeshard.kernels.ground.first_calls  # noqa: F401

# Mean squares of numbers that fp32 holds together with their squares, with room on both sides.
LEAST, MOST = 1e-30, 1e30


class Gate(NamedTuple):
    """The alignment test of one delta."""

    cosine: Tensor
    """cos(P D, D), a 0-d fp64 tensor; NaN where D or V is zero or an input is not finite; 0 where only P D is zero."""
    projected: Tensor
    """P B (O x r) of a LoRA delta, P D (O x I) of a full one, in fp32; all zero where V is."""


def cosine(dot: Tensor, projected_square: Tensor, delta_square: Tensor, squared_norm: Tensor) -> Tensor:
    """dot / sqrt(projected_square delta_square); 0 where only the projection is zero, NaN where D or V is.

    Squares that cancel to a tiny negative number count as zero.
    """
    projected_square, delta_square = projected_square.clamp_min(0), delta_square.clamp_min(0)
    scale = projected_square.sqrt() * delta_square.sqrt()
    cosine = torch.where((projected_square == 0) & (delta_square > 0), 0.0, dot / scale)
    return torch.where(torch.isfinite(scale) & (squared_norm > 0), cosine, torch.nan)


def over_norm(product: Tensor, squared_norm: Tensor) -> Tensor:
    """V (V^T B) / |V|_F, and zero for V = 0; in place of the product."""
    return product.div_(torch.where(squared_norm == 0, 1.0, squared_norm).sqrt().to(product.dtype))


def fits(mean_square: Tensor) -> Tensor:
    """Whether numbers of this mean square, and their squares, are well inside of fp32's range."""
    return (mean_square >= LEAST) & (mean_square <= MOST)


def scaled(minuend: Tensor, subtrahend: Tensor) -> tuple[Tensor, int]:
    """minuend - subtrahend in fp32, times a power of two that makes its largest entry 1/2 to 1, and that exponent."""
    difference = minuend.float() - subtrahend.float()
    least, most = difference.aminmax() if difference.numel() else (difference.new_zeros(()),) * 2
    largest = max(abs(float(least)), abs(float(most)))
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    half = exponent // 2  # in two steps, for 2^-exponent may be more than fp32 holds
    return difference.mul_(2.0**-half).mul_(2.0 ** (half - exponent)), exponent
