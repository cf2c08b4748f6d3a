"""V (V^T B) and |V|_F^2 in torch, V = aligned - unaligned tile by tile: no more of V in fp32 than a core's cache holds.

Of a weight with few rows, such as an expert's, a tile is a strip of columns, which serves both products: it is
converted, or decoded, once. Of others it is some whole rows, converted faster than narrow strips, once a product.

Shapes: as in `kernels/projection.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from safeshard.kernels.alignment.coded import Coded, Weight, decoded
from safeshard.kernels.alignment.stacks import Stack, column_width, row_widths, stacked, strip_widths, turned
from safeshard.kernels.ground.scratch import scratch

# fp32 elements of a tile of rows (2 MiB, which stays in a core's L2 cache) and its fewest rows, below which the
# products are too thin.
TILE_ELEMENTS = 1 << 19
MIN_TILE_ROWS = 64

# Of a strip of columns, and its fewest columns; of how many of its rows the two weights are converted in turn.
STRIP_ELEMENTS = 1 << 19
MIN_STRIP_COLUMNS = 128
STRIP_ROWS = 512

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
    shapes = {(rows, min(width, columns)), (rows, columns % width or min(width, columns))}
    stacks = [(stack, strip_widths(shapes, stack)) for stack in stacked(factors)]
    projected = [stack.rows.new_zeros((rows, len(stack.rows))) for stack, _ in stacks]
    # Kept from strip to strip: new memory would cost as much as a tenth of the products.
    inner = [stack.rows.new_empty(len(stack.rows) * min(width, columns)) for stack, _ in stacks]
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    for strip in _strips(aligned, unaligned, width):
        # Of codes all rounding errors may have one sign: their sums are kept short.
        even = strip.shape[1] % MIN_STRIP_COLUMNS == 0
        squared_norm += _squared_norm(strip.view(-1, MIN_STRIP_COLUMNS) if even else strip)
        for (stack, widths), room, z in zip(stacks, inner, projected, strict=True):
            y = room[: len(stack.rows) * strip.shape[1]].view(len(stack.rows), -1).zero_()
            for cut in stack.cuts(widths.first):
                y[cut].addmm_(stack.rows[cut], strip)
            for cut in stack.cuts(widths.second):
                if widths.quick:
                    z[:, cut].addmm_(strip, y[cut].T)
                else:
                    z[:, cut] += strip @ y[cut].T
    return _factors(stacks, projected), squared_norm


def _factors(stacks: Iterable[tuple[Stack, object]], projected: Iterable[Tensor]) -> list[Tensor]:
    """The columns of each factor, from products O x S, contiguous and with the strides of their shape.

    A single column counts as contiguous whatever its strides; libraries of matrices sum by these.
    """
    parts = [z[:, span] for (stack, _), z in zip(stacks, projected, strict=True) for span in stack.spans]
    return [z if z.stride() == (z.shape[1], 1) else z.new_empty(z.shape).copy_(z) for z in parts]


def _strips(aligned: Weight, unaligned: Weight, width: int) -> Iterator[Tensor]:
    """Yield strips of V in fp32; the tensor is overwritten by the next step, and by this thread's next V."""
    rows, columns = aligned.shape
    coded = any(isinstance(weight, Coded) for weight in (aligned, unaligned))
    few = rows if coded else min(rows, STRIP_ROWS)
    own, other = (
        scratch(name, n * min(width, columns), torch.float32, aligned.device)
        for name, n in (("strip", rows), ("other strip", few))
    )
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        size = part.stop - start
        strip, theirs = own[: rows * size].view(rows, size), other[: few * size].view(few, size)
        if isinstance(aligned, Tensor) and isinstance(unaligned, Tensor):
            _subtract(aligned[:, part], unaligned[:, part], strip, theirs)
        else:
            _convert(aligned, part, strip)
            strip.sub_(_convert(unaligned, part, theirs))
        yield strip


def _subtract(minuend: Tensor, subtrahend: Tensor, out: Tensor, buffer: Tensor) -> None:
    """out = minuend - subtrahend in fp32, as many rows at a time as `buffer` has: they stay in cache."""
    few = len(buffer)
    for own, mine, theirs in zip(out.split(few), minuend.split(few), subtrahend.split(few), strict=True):
        # twice as fast as subtracting what has another dtype
        own.copy_(mine).sub_(theirs if theirs.dtype == torch.float32 else buffer[: len(own)].copy_(theirs))


def _convert(weight: Weight, part: slice, out: Tensor) -> Tensor:
    """Some columns of a weight in fp32, in `out`."""
    return weight.decode(part, out) if isinstance(weight, Coded) else out.copy_(weight[:, part])


def _row_tiles(aligned: Tensor, unaligned: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, V[rows] in fp32) over all rows; the tensor is overwritten by the next step."""
    rows, cols = aligned.shape
    step = max(1, min(rows, _tile_rows(cols)))
    buffer, other = (aligned.new_empty((n, cols), dtype=torch.float32) for n in (step, -(-step // 4)))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        tile = buffer[: part.stop - start]
        _subtract(aligned[part], unaligned[part], tile, other)
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
    shapes = _shapes(rows, cols)
    stacks = [(stack, row_widths(shapes, stack)) for stack in stacked(factors)]
    inner = [stack.rows.new_zeros((len(stack.rows), cols)) for stack, _ in stacks]
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    kept = [*_row_tiles(aligned, unaligned)] if rows <= _tile_rows(cols) else []
    for part, tile in kept or _row_tiles(aligned, unaligned):
        squared_norm += _squared_norm(tile)
        for (stack, widths), y in zip(stacks, inner, strict=True):
            for cut in stack.cuts(widths.first):
                y[cut].addmm_(stack.rows[cut, part], tile)
    # Those whose transpose is made lie by columns.
    projected = [torch.empty_like(s.rows).T if w.quick else s.rows.new_empty(s.rows.T.shape) for s, w in stacks]
    for part, tile in kept or _row_tiles(aligned, unaligned):
        for (stack, widths), y, z in zip(stacks, inner, projected, strict=True):
            for cut in stack.cuts(widths.second):
                if widths.quick:
                    turned(y[cut], tile, out=z.T[cut, part])
                else:
                    torch.mm(tile, y[cut].T, out=z[part, cut])
    return _factors(stacks, projected), squared_norm


def _by_columns(aligned: Tensor, unaligned: Tensor, factors: Sequence[Tensor]) -> Products:
    """One pass over tiles of V's columns, for weights stored transposed: there a column of V is contiguous."""
    shapes = _shapes(*aligned.T.shape)
    stacks = [(stack, column_width(shapes, stack)) for stack in stacked(factors)]
    parts = [[stack.rows[cut].T.contiguous() for cut in stack.cuts(width)] for stack, width in stacks]
    projected = [[torch.zeros_like(part) for part in each] for each in parts]
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    for _, tile in _row_tiles(aligned.T, unaligned.T):
        squared_norm += _squared_norm(tile)
        for own, sums in zip(parts, projected, strict=True):
            for part, z in zip(own, sums, strict=True):
                z.addmm_(tile.T, tile @ part)
    return _factors(stacks, [torch.cat(sums, dim=1) for sums in projected]), squared_norm
