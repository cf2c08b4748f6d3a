"""fp8 (E4M3) and int8 with a scale for each block, row or tensor: weight = values * scale.

DeepSeek and Qwen store fp8 by blocks of 128 x 128 (`weight_scale_inv`, which despite its name is multiplied with);
compressed-tensors, llm-compressor, ModelOpt and FBGEMM by tensor or by row (`weight_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import safeshard.kernels.ground.first_calls  # noqa: F401
from safeshard.kernels.alignment.coded import Coded, widen_e4m3
from safeshard.streamer.inputs.codecs.base import TILE, Stored, block_max, expand, storable

TOP = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # the largest values


@dataclass(frozen=True)
class Scaled:
    """Values of one byte. `rows` and `columns` share a scale; 0 means all of them.

    `scales` is the ending of the scales' name. With `powers` scales are powers of two.
    """

    name: str
    rows: int
    columns: int
    scales: str = ".weight_scale"
    powers: bool = False
    packed = 1

    @property
    def names(self) -> Mapping[str, str]:
        return {"values": ".weight", "scales": self.scales}

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]

    def shapes(self, shape: tuple[int, int]) -> Mapping[str, Sequence[tuple[int, ...]]]:
        rows, columns = self.block(shape)
        tall, wide = -(-shape[0] // rows), -(-shape[1] // columns)
        scales: list[tuple[int, ...]] = [(tall, wide)]
        if not self.columns:
            scales += [(tall,)] if self.rows else [(), (1,)]
        return {"values": [shape], "scales": scales}

    def decode(self, stored: Stored) -> Tensor:
        values = stored["values"]
        rows, columns = self.block((values.shape[0], values.shape[1]))
        scales = _grid(stored["scales"], values, rows, columns)
        out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        step = min(rows, max(1, TILE // values.shape[1])) if rows > 1 else max(1, TILE // values.shape[1])
        start = 0
        while start < values.shape[0]:
            stop = min(start + step, values.shape[0])
            if rows > 1:  # a tile has one row of scales
                stop = min(stop, (start // rows + 1) * rows)
            tile = _widen(values[start:stop], out[start:stop])
            tile.mul_(expand(scales[start // rows : (stop - 1) // rows + 1], 1, columns, tile.shape))
            start = stop
        return out

    def in_codes(self, dtype: str) -> bool:
        return dtype == "F8_E4M3"

    def coded(self, stored: Stored) -> Coded:
        values = stored["values"]
        block = self.block((values.shape[0], values.shape[1]))
        return Coded("e4m3", values.view(torch.uint8), _grid(stored["scales"], values, *block), block)

    def encode(self, values: Tensor, like: Stored) -> dict[str, Tensor]:
        dtype = like["values"].dtype
        block = self.block((values.shape[0], values.shape[1]))
        scales = block_max(values.abs(), block) / TOP[dtype]
        if self.powers:
            scales = torch.exp2(torch.ceil(torch.log2(scales)).clamp(-127, 127))
        if like["scales"].dtype == torch.uint8:
            scales = (torch.log2(scales) + 127).round().to(torch.uint8)
        else:
            scales = storable(scales, like["scales"].dtype)
        quotients = values / expand(_numbers(scales), *block, values.shape)
        if dtype == torch.int8:
            quotients = quotients.round()
        quotients.clamp_(-TOP[dtype], TOP[dtype])  # a scale that was rounded down
        return {"values": quotients.to(dtype), "scales": scales.reshape(like["scales"].shape)}


class Fused(Scaled):
    """Scaled values of fused experts, whose tensor's name ends without `.weight`."""

    @property
    def names(self) -> Mapping[str, str]:
        return {"values": "", "scales": self.scales}


def _grid(scales: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """The scales as fp32, a row and a column a block."""
    return _numbers(scales).view(-(-values.shape[0] // rows), -(-values.shape[1] // columns))


def _numbers(scales: Tensor) -> Tensor:
    """Scales as fp32. Bytes are E8M0: exponents, 2^(s - 127); 255 is NaN."""
    if scales.dtype != torch.uint8:
        return scales.float()
    numbers = torch.exp2(scales.double() - 127).float()
    return numbers.masked_fill(scales == 255, torch.nan)


def _widen(values: Tensor, out: Tensor) -> Tensor:
    """Values of one byte as fp32, into `out`."""
    if values.dtype != torch.float8_e4m3fn or values.is_cuda:
        return out.copy_(values)
    return widen_e4m3(values.view(torch.uint8), out)
