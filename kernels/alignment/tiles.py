"""V (V^T B) and |V|_F^2 in torch, V = aligned - unaligned tile by tile: no more of V in fp32 than a core's cache holds.

Of a weight with few rows, such as an expert's, a tile is a strip of columns, which serves both products: it is
converted, or decoded, once. Of others it is some whole rows, converted faster than narrow strips, once a product.

Shapes: as in `kernels/projection.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from safeshard.kernels.alignment.coded import Coded, Weight, decoded
from safeshard.kernels.scratch import scratch

# fp32 elements of a tile of rows (2 MiB, which stays in a core's L2 cache) and its fewest rows, below which the
# products are too thin.
TILE_ELEMENTS = 1 << 19
MIN_TILE_ROWS = 64

# Of a strip of columns, of which there are two, and its fewest columns.
STRIP_ELEMENTS = 1 << 19
MIN_STRIP_COLUMNS = 128

# Factors are padded to whole LANES of columns and multiplied up to STACK columns at a time, half again as fast as one
# by one at rank 16, where that changes no bit.
LANES, STACK = 16, 128

Products = tuple[list[Tensor], Tensor]  # V (V^T B) for each factor B, and |V|_F^2


def products(aligned: Weight, unaligned: Weight, factors: Sequence[Tensor]) -> Products:
    """V (V^T B) for each factor B, fp32, and |V|_F^2, fp64."""
    rows, columns = aligned.shape
    several = rows * columns > TILE_ELEMENTS
    if several and (width := strip_columns(aligned, unaligned)):
        return _by_strips(aligned, unaligned, factors, width)
    a, u = decoded(aligned), decoded(unaligned)
    return (_by_columns if a.stride(0) < a.stride(1) else _by_rows)(a, u, factors)


def strip_columns(aligned: Weight, unaligned: Weight) -> int:
    """How many columns a strip has; 0 where whole rows, or columns that are stored as such, are better.

    A quantised weight's strips hold whole blocks.
    """
    (rows, columns), weights = aligned.shape, (aligned, unaligned)
    coded = [weight.block[1] for weight in weights if isinstance(weight, Coded)]
    step = math.lcm(MIN_STRIP_COLUMNS, *(width for width in coded if width < columns))
    width = STRIP_ELEMENTS // rows // step * step
    if coded:
        return max(width, step)
    return 0 if any(w.stride(0) < w.stride(1) for w in weights if isinstance(w, Tensor)) else width


def _by_strips(aligned: Weight, unaligned: Weight, factors: Sequence[Tensor], width: int) -> Products:
    """One pass over strips of V's columns."""
    rows, columns = aligned.shape
    groups = _groups(factors, {(rows, min(width, columns)), (rows, columns % width or min(width, columns))})
    stacks = [torch.cat(group, dim=1).T.contiguous() for group in groups]
    projected = [stack.new_zeros((rows, stack.shape[0])) for stack in stacks]
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    for strip in _strips(aligned, unaligned, width):
        # Of codes all rounding errors may have one sign: their sums are kept short.
        even = strip.shape[1] % MIN_STRIP_COLUMNS == 0
        squared_norm += _squared_norm(strip.view(-1, MIN_STRIP_COLUMNS) if even else strip)
        for stack, z in zip(stacks, projected, strict=True):
            y = stack.new_zeros((stack.shape[0], strip.shape[1])).addmm_(stack, strip)
            z += torch.mm(strip, y.T)
    return _ungroup(projected, groups, factors), squared_norm


def _strips(aligned: Weight, unaligned: Weight, width: int) -> Iterator[Tensor]:
    """Yield strips of V in fp32; the tensor is overwritten by the next step, and by this thread's next V."""
    rows, columns = aligned.shape
    size = rows * min(width, columns)
    buffers = [scratch(name, size, torch.float32, aligned.device) for name in ("strip", "other strip")]
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        strip, other = (buffer[: rows * (part.stop - start)].view(rows, -1) for buffer in buffers)
        _convert(aligned, part, strip)
        yield strip.sub_(_convert(unaligned, part, other))


def _convert(weight: Weight, part: slice, out: Tensor) -> Tensor:
    """Some columns of a weight in fp32, in `out` unless it is that already."""
    return weight.decode(part, out) if isinstance(weight, Coded) else out.copy_(weight[:, part])


def _row_tiles(aligned: Tensor, unaligned: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, V[rows] in fp32) over all rows; the tensor is overwritten by the next step."""
    rows, cols = aligned.shape
    step = max(1, min(rows, _tile_rows(cols)))
    buffer = aligned.new_empty((step, cols), dtype=torch.float32)
    few = -(-step // 4)
    other = aligned.new_empty((0 if unaligned.dtype == torch.float32 else few, cols), dtype=torch.float32)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        tile = buffer[: part.stop - start]
        tile.copy_(aligned[part])
        if len(other):  # twice as fast as subtracting what has another dtype
            for own, theirs in zip(tile.split(few), unaligned[part].split(few), strict=True):
                own.sub_(other[: len(own)].copy_(theirs))
        else:
            tile.sub_(unaligned[part])
        yield part, tile


def _tile_rows(cols: int) -> int:
    return max(MIN_TILE_ROWS, TILE_ELEMENTS // max(1, cols))


def _shapes(rows: int, cols: int) -> set[tuple[int, int]]:
    """Of the tiles that `_row_tiles` cuts."""
    step = max(1, min(rows, _tile_rows(cols)))
    return {(step, cols), (rows % step or step, cols)}


def _squared_norm(tile: Tensor) -> Tensor:
    """|tile|_F^2 in fp64 from fp32 row norms: as exact as fp64 throughout to 1e-8, at a quarter of the time."""
    return torch.linalg.vector_norm(tile, dim=1).double().square().sum()


def _by_rows(aligned: Tensor, unaligned: Tensor, factors: Sequence[Tensor]) -> Products:
    """Two passes over row tiles of V, for weights stored by rows; where there is one tile, one."""
    rows, cols = aligned.shape
    groups = _groups(factors, _shapes(rows, cols))
    stacks = [torch.cat(group, dim=1).T.contiguous() for group in groups]
    inner = [stack.new_zeros((stack.shape[0], cols)) for stack in stacks]
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    kept = [*_row_tiles(aligned, unaligned)] if rows <= _tile_rows(cols) else []
    for part, tile in kept or _row_tiles(aligned, unaligned):
        squared_norm += _squared_norm(tile)
        for stack, y in zip(stacks, inner, strict=True):
            y.addmm_(stack[:, part], tile)
    projected = [stack.new_empty((rows, stack.shape[0])) for stack in stacks]
    for part, tile in kept or _row_tiles(aligned, unaligned):
        for y, z in zip(inner, projected, strict=True):
            torch.mm(tile, y.T, out=z[part])
    return _ungroup(projected, groups, factors), squared_norm


def _by_columns(aligned: Tensor, unaligned: Tensor, factors: Sequence[Tensor]) -> Products:
    """One pass over tiles of V's columns, for weights stored transposed: there a column of V is contiguous."""
    groups = _groups(factors, _shapes(*aligned.T.shape))
    stacks = [torch.cat(group, dim=1) for group in groups]
    projected = [torch.zeros_like(stack) for stack in stacks]
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    for _, tile in _row_tiles(aligned.T, unaligned.T):
        squared_norm += _squared_norm(tile)
        for stack, z in zip(stacks, projected, strict=True):
            z.addmm_(tile.T, tile @ stack)
    return _ungroup(projected, groups, factors), squared_norm


def _groups(factors: Sequence[Tensor], tiles: Iterable[tuple[int, int]]) -> list[list[Tensor]]:
    """The factors in fp32, each padded with zero columns to whole LANES, in groups of up to STACK columns.

    `tiles` are the shapes of what they are multiplied with.
    """
    limit = STACK if len(factors) > 1 and all(_stackable(*shape) for shape in tiles) else LANES
    groups: list[list[Tensor]] = []
    room = 0
    for factor in factors:
        padded = torch.nn.functional.pad(factor.float(), (0, -factor.shape[1] % LANES))
        if not groups or padded.shape[1] > room:
            groups.append([])
            room = limit
        groups[-1].append(padded)
        room -= padded.shape[1]
    return groups


def _ungroup(
    projected: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], factors: Sequence[Tensor]
) -> list[Tensor]:
    """The columns of each factor, contiguous, from the products of `_groups`."""
    wide = [
        part
        for z, group in zip(projected, groups, strict=True)
        for part in z.split([factor.shape[1] for factor in group], dim=1)
    ]
    return [part[:, : factor.shape[1]].contiguous() for part, factor in zip(wide, factors, strict=True)]


@cache
def _stackable(rows: int, cols: int) -> bool:
    """Whether both products with a tile give a factor the same bits alone and in the last place of a stack.

    Matrix libraries choose the order of summation by the sizes; MKL does not by the number of whole lanes.
    """
    generator = torch.Generator().manual_seed(0)
    tile, stack = (torch.randn(size, generator=generator) for size in ((rows, cols), (rows, STACK)))
    wide, alone = stack.T.contiguous(), stack[:, -LANES:].T.contiguous()
    y = torch.ones(STACK, cols).addmm_(wide, tile)
    y_alone = torch.ones(LANES, cols).addmm_(alone, tile)
    z, z_alone = tile @ y.T, tile @ y_alone.T
    return torch.equal(y[-LANES:], y_alone) and torch.equal(z[:, -LANES:], z_alone)
