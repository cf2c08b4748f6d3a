"""Compensation where every row keeps entries of its own (`selection="row"`), in delta space.

Source: OBS as SparseGPT (arXiv 2301.00774, section 3) runs it, column by column: where entry j of a row x is set to
d_j, the rest of the row moves by -(x_j - d_j) / U_jj * U_j, later columns only. Within a sub-block of `sub_block`
columns nothing is moved (the published approximation of Safe Delta; 1 is exact OBS).

    e_j = kept_j * (x_j - d_j) / U_jj;   x_k -= e_j U_jk  for every k in a later sub-block

The recursion runs over chunks of columns: inside a chunk on chip (Triton) or by halving (torch), and what a chunk does
to the columns after it is one matrix product. Shapes: X and D are O x I, U is I x I, all fp32; a block has n columns.
"""

from __future__ import annotations

import torch

from safeshard.kernels.backend import Backend, blocks, launch, resolve
from safeshard.kernels.lang import tl, triton

CHUNK = 128  # columns of a chunk; also the largest sub-block

_BLOCK_R = 16
_LAUNCH = {"CHUNK": CHUNK, "BLOCK_R": _BLOCK_R, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def _row_chunk_kernel(
    change_ptr,  # (rows, width) fp32, in and out
    delta_ptr,  # (rows, width) fp32
    kept_ptr,  # (rows, width) bool
    u_ptr,  # (width, width) fp32
    error_ptr,  # (rows, width) fp32, out
    rows,
    width,
    sub_block,
    stride_change,
    stride_delta,
    stride_kept,
    stride_u,
    stride_error,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (row tiles,); one program runs the recursion over one chunk for BLOCK_R rows, held in registers. fp32."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    col = tl.arange(0, CHUNK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    place = change_ptr + row[:, None] * stride_change + col[None, :]
    change = tl.load(place, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + row[:, None] * stride_delta + col[None, :], mask=inside, other=0.0)
    kept = tl.load(kept_ptr + row[:, None] * stride_kept + col[None, :], mask=inside, other=0) != 0
    error = tl.zeros((BLOCK_R, CHUNK), dtype=tl.float32)
    u_row = u_ptr
    for j in range(width):
        later = (col < width) & (col // sub_block > j // sub_block)
        spread = tl.load(u_row + col, mask=later, other=0.0)
        here = (col == j)[None, :]
        # div_rn is the exact quotient; "/" is an approximation on a device.
        e = tl.sum(tl.where(here & kept, change - delta, 0.0), axis=1)
        e = tl.div_rn(e, tl.load(u_row + j))
        change -= e[:, None] * spread[None, :]
        error = tl.where(here, e[:, None], error)
        u_row += stride_u
    tl.store(place, tl.where(kept, delta, change), mask=inside)
    tl.store(error_ptr + row[:, None] * stride_error + col[None, :], error, mask=inside)


def _chunk_triton(
    change: torch.Tensor, delta: torch.Tensor, kept: torch.Tensor, u: torch.Tensor, error: torch.Tensor, sub_block: int
) -> None:
    rows, width = change.shape
    strides = (change.stride(0), delta.stride(0), kept.stride(0), u.stride(0), error.stride(0))
    grid = (blocks(rows, _BLOCK_R),)
    launch(_row_chunk_kernel, grid, change, delta, kept, u, error, rows, width, sub_block, *strides, **_LAUNCH)


def _chunk_torch(
    change: torch.Tensor, delta: torch.Tensor, kept: torch.Tensor, u: torch.Tensor, error: torch.Tensor, sub_block: int
) -> None:
    # Columns become rows, so that every slice of the recursion is contiguous.
    columns, errors = change.T.contiguous(), torch.empty_like(change.T, memory_format=torch.contiguous_format)
    _halve(columns, delta.T.contiguous(), kept.T.contiguous(), u, errors, sub_block)
    change.copy_(columns.T)
    error.copy_(errors.T)


def _halve(
    change: torch.Tensor, delta: torch.Tensor, kept: torch.Tensor, u: torch.Tensor, error: torch.Tensor, sub_block: int
) -> None:
    """The recursion on transposed operands (columns x rows): first half, its effect on the second half, second half."""
    width = len(change)
    if width <= sub_block:
        torch.sub(change, delta, out=error)
        error.div_(u.diagonal()[:, None]).masked_fill_(~kept, 0)
        change.copy_(torch.where(kept, delta, change))
        return
    mid = (width // sub_block + 1) // 2 * sub_block
    _halve(change[:mid], delta[:mid], kept[:mid], u[:mid, :mid], error[:mid], sub_block)
    change[mid:].addmm_(u[:mid, mid:].T, error[:mid], alpha=-1)
    _halve(change[mid:], delta[mid:], kept[mid:], u[mid:, mid:], error[mid:], sub_block)


def compensate_rows(
    change: torch.Tensor,
    delta: torch.Tensor,
    kept: torch.Tensor,
    u: torch.Tensor,
    start: int,
    sub_block: int,
    *,
    backend: Backend = "auto",
) -> None:
    """Set the kept entries of one block of `change` to those of `delta` and compensate later columns, in place.

    The products between chunks run in torch at the process's fp32 matrix precision ("highest" by default).

    Args:
        change: X, O x I fp32.
        delta: D, O x I fp32.
        kept: O x n booleans, the entries of columns start ... start + n.
        u: I x I fp32, upper triangular.
        start: first column of the block.
        sub_block: 1 ... 128 columns that do not affect each other.

    Example:
        change [[0, 0]], delta [[2, 5]], kept [[True, False]], u [[2, 0.5], [0, 1]], start 0, sub_block 1: e_0 = -1, so
        change becomes [[2, 0.5]].
    """
    step = _chunk_triton if resolve(backend, change, delta, kept, u) == "triton" else _chunk_torch
    stop = start + kept.shape[1]
    error = torch.empty(kept.shape, dtype=torch.float32, device=change.device)
    chunk = CHUNK // sub_block * sub_block
    for lo in range(start, stop, chunk):
        hi = min(lo + chunk, stop)
        own, done = slice(lo, hi), error[:, lo - start : hi - start]
        step(change[:, own], delta[:, own], kept[:, lo - start : hi - start], u[own, own], done, sub_block)
        change[:, hi:stop].addmm_(done, u[own, hi:stop], alpha=-1)
    change[:, stop:].addmm_(error, u[start:stop, stop:], alpha=-1)
