"""Deltas of full checkpoints, in row tiles: fp32 arithmetic without an fp32 copy of a whole weight.

Results come as row tiles, in order, so that each is checked, hashed and written while it is in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from safeshard.kernels import merge, ranks

PIECE = 1 << 18  # elements of an element-wise piece, which stays in a core's L2 cache in fp32
ROWS = 256  # rows a tile; part of dare_linear's random stream, so changing it changes outputs


def tiles(rows: int) -> Iterator[slice]:
    """Slices of ROWS rows over all rows."""
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


def add_deltas(
    aligned: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    dtype: torch.dtype,
    density: float | None = None,
    key: Callable[[int, int], int] | None = None,
) -> Iterator[Tensor]:
    """Tiles of aligned + sum_i weights[i] * (tuned[i] - aligned), as `dtype`; `density` drops entries of the deltas.

    `key(i, row)` is the random key of the tile of delta i that starts at `row`.
    """
    for rows in tiles(aligned.shape[0]):
        base = aligned[rows].float()
        deltas = [t[rows].float() - base for t in tuned]
        if density is None:
            total = merge.linear(deltas, weights)
        else:
            assert key is not None
            total = merge.dare_linear(deltas, weights, density, [key(i, rows.start) for i in range(len(deltas))])
        yield (base + total).to(dtype)


def add_difference(
    weight: Tensor,
    pair: tuple[Tensor, Tensor] | None,
    minuend: Tensor,
    subtrahend: Tensor,
    factor: float,
    dtype: torch.dtype,
    density: float,
    key: Callable[[int], int],
) -> Iterator[Tensor]:
    """Tiles of weight + B A + factor * DARE(minuend - subtrahend), as `dtype`; without `pair`, B A is 0.

    Args:
        weight, minuend, subtrahend: O x I.
        pair: A (r x I) and B (O x r), fp32.
        density: the fraction of the difference's entries that are kept, and divided by it; 1 keeps all as they are.
        key: the random key of the tile that starts at a row.
    """
    for rows in tiles(weight.shape[0]):
        difference = minuend[rows].float() - subtrahend[rows].float()
        added = merge.dare_linear([difference], [factor], density, [key(rows.start)])
        del difference
        base = weight[rows].float()
        if pair is not None:
            base = base.addmm(pair[1][rows], pair[0])
        yield (base + added).to(dtype)


def add_low_rank_delta(
    aligned: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], rank: int, dtype: torch.dtype
) -> tuple[Iterator[Tensor], float]:
    """Tiles of aligned + the best approximation of the deltas of rank `rank`, as `dtype`; and the fraction lost."""
    delta = torch.zeros(aligned.shape, device=aligned.device)
    for rows in tiles(aligned.shape[0]):
        base = aligned[rows].float()
        delta[rows] = merge.linear([t[rows].float() - base for t in tuned], weights)
    low, lost = ranks.truncate_dense(delta, rank)
    return add(aligned, low, dtype), float(lost)


def add(aligned: Tensor, delta: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Tiles of aligned + delta (fp32), as `dtype`."""
    for rows in tiles(aligned.shape[0]):
        yield (aligned[rows].float() + delta[rows]).to(dtype)


def stacked(tiles: Iterable[Tensor]) -> Tensor:
    """Row tiles, one below the other."""
    return torch.cat(list(tiles))


def where(mask: Tensor, tuned: Tensor, new: Iterator[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tiles of `new`, with `tuned` to the bit (as `dtype`) where `mask` is set."""
    for rows, tile in zip(tiles(tuned.shape[0]), new, strict=True):
        yield torch.where(mask[rows], tuned[rows].to(dtype), tile)


def interpolate(aligned: Tensor, tuned: Tensor, factor: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """Tiles of aligned + factor * (tuned - aligned), as `dtype`; exactly `aligned` at 0 and `tuned` at 1. Any shape."""
    aligned, tuned = (t.reshape(t.shape or (1,)) for t in (aligned, tuned))
    rows = max(1, PIECE // max(1, math.prod(aligned.shape[1:])))
    fused = aligned.dtype == tuned.dtype == dtype  # computed in fp32 all the same, and rounded once
    for base, theirs in zip(torch.split(aligned, rows), torch.split(tuned, rows), strict=True):
        yield torch.lerp(base, theirs, factor) if fused else torch.lerp(base.float(), theirs.float(), factor).to(dtype)
