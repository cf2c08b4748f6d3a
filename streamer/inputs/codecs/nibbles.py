"""Bytes that hold two values of four bits, the low half first."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from safeshard.streamer.inputs.codecs.base import TILE


@cache
def _pairs(table: tuple[float, ...], device: str) -> Tensor:
    """For each byte its two values as halves, in one int32: what is looked up is moved in one piece."""
    low = torch.tensor(table, dtype=torch.float16)
    byte = torch.arange(256)
    return torch.stack((low[byte & 15], low[byte >> 4]), 1).view(torch.int32).view(-1).to(device)


def unpack(packed: Tensor, table: tuple[float, ...]) -> Tensor:
    """The values of rows of bytes (O x n uint8) by a table of 16, O x 2n fp32. The values must fit halves."""
    rows, count = packed.shape
    pairs = _pairs(table, str(packed.device))
    out = torch.empty((rows, 2 * count), dtype=torch.float32, device=packed.device)
    flat, wide = packed.reshape(-1), out.view(-1)
    for start in range(0, rows * count, TILE):
        found = torch.index_select(pairs, 0, flat[start : start + TILE].int())
        wide[2 * start : 2 * (start + len(found))].copy_(found.view(torch.float16))
    return out


def pack(codes: Tensor) -> Tensor:
    """Codes from 0 to 15 (O x 2n uint8) as bytes, O x n."""
    pairs = codes.view(codes.shape[0], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4
