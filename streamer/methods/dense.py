"""Deltas of full checkpoints, in row tiles: fp32 arithmetic without an fp32 copy of a whole weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from safeshard.kernels import merge

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
) -> Tensor:
    """aligned + sum_i weights[i] * (tuned[i] - aligned), as `dtype`; deltas are dropped to `density` where it is given.

    `key(i, row)` is the random key of the tile of delta i that starts at `row`.
    """
    out = torch.empty(aligned.shape, dtype=dtype, device=aligned.device)
    for rows in tiles(aligned.shape[0]):
        base = aligned[rows].float()
        deltas = [t[rows].float() - base for t in tuned]
        if density is None:
            total = merge.linear(deltas, weights)
        else:
            assert key is not None
            total = merge.dare_linear(deltas, weights, density, [key(i, rows.start) for i in range(len(deltas))])
        out[rows] = base + total
    return out


def add_low_rank_delta(
    aligned: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], rank: int, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """aligned + the best rank-`rank` approximation of the weighted deltas, as `dtype`; and the fraction lost."""
    delta = torch.zeros(aligned.shape, device=aligned.device)
    for rows in tiles(aligned.shape[0]):
        base = aligned[rows].float()
        delta[rows] = merge.linear([t[rows].float() - base for t in tuned], weights)
    low, lost = merge.truncate_dense(delta, rank)
    return add(aligned, low, dtype), float(lost)


def add(aligned: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """aligned + delta (fp32), as `dtype`."""
    out = torch.empty(aligned.shape, dtype=dtype, device=aligned.device)
    for rows in tiles(aligned.shape[0]):
        out[rows] = aligned[rows].float() + delta[rows]
    return out


def interpolate(aligned: Tensor, tuned: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """aligned + factor * (tuned - aligned), as `dtype`; exactly `aligned` at 0 and `tuned` at 1. Any shape."""
    out = torch.empty(aligned.shape, dtype=dtype, device=aligned.device)
    flat_out, flat_aligned, flat_tuned = out.view(-1), aligned.reshape(-1), tuned.reshape(-1)
    step = 1 << 20
    for start in range(0, out.numel(), step):
        part = slice(start, start + step)
        flat_out[part] = torch.lerp(flat_aligned[part].float(), flat_tuned[part].float(), factor)
    return out
