"""The sums of a gate over r x r Gram matrices, in Triton: those of all adapters of one rank in a few launches.

Shapes: B and Z are O x R, A^T is I x R, the adapters' columns side by side; a member is one adapter's r columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safeshard.kernels.backend import blocks, launch
from safeshard.kernels.lang import tl, triton

# Rows of one product, rows of one program, the tile of a Gram matrix that a program owns, and how many entries of the
# Gram matrices are multiplied at a time.
BLOCK_N, CHUNK_N, BLOCK_R = 64, 1024, 16
BLOCK_SUM = 512
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def _inner_kernel(
    x_ptr,  # n x R, fp32, strided
    y_ptr,  # n x R, fp32, strided
    first_ptr,  # members, int64: where a member's r columns begin
    out_ptr,  # chunks x ... x members x r x r, fp64
    n,
    r,
    x_stride_n,
    x_stride_r,
    y_stride_n,
    y_stride_r,
    out_stride,  # of a chunk
    CHUNK: tl.constexpr,  # rows of a program, a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[c, member] = x[c]^T y[c] over the c-th chunk of rows and a member's columns.

    Grid: (tiles of r x tiles of r, members, chunks). Each block of rows is multiplied in fp32 ("ieee") and added in
    fp64.
    """
    tiles = tl.cdiv(r, BLOCK_R)
    member, part = tl.program_id(1), tl.program_id(2)
    cols_x = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    cols_y = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.load(first_ptr + member)
    x_cols, y_cols = (first + cols_x) * x_stride_r, (first + cols_y) * y_stride_r
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, n), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        rows_long = rows.to(tl.int64)
        x_offsets = rows_long[None, :] * x_stride_n + x_cols[:, None]
        y_offsets = rows_long[:, None] * y_stride_n + y_cols[None, :]
        x = tl.load(x_ptr + x_offsets, (rows < n)[None, :] & (cols_x < r)[:, None], 0.0)
        y = tl.load(y_ptr + y_offsets, (rows < n)[:, None] & (cols_y < r)[None, :], 0.0)
        acc += tl.dot(x, y, input_precision="ieee").to(tl.float64)
    out = part.to(tl.int64) * out_stride + (member.to(tl.int64) * r + cols_x[:, None]) * r + cols_y[None, :]
    tl.store(out_ptr + out, acc, (cols_x < r)[:, None] & (cols_y < r)[None, :])


@triton.jit
def _sums_kernel(
    aa_ptr,  # members x size, fp64: A A^T
    b_ptr,  # 3 x members x size, fp64: B^T B, B^T Z, Z^T Z
    out_ptr,  # 3 x members, fp64
    size,  # r x r
    BLOCK: tl.constexpr,
):
    """out[i, member] = sum(b[i, member] * aa[member]). Grid: (members, 3)."""
    member, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = which * tl.num_programs(0) + member
    acc = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        aa = tl.load(aa_ptr + member * size + entry, entry < size, 0.0)
        acc += aa * tl.load(b_ptr + place * size + entry, entry < size, 0.0)
    tl.store(out_ptr + place, tl.sum(acc))


def _inner_triton(pairs: Sequence[tuple[Tensor, Tensor]], first: Tensor, r: int) -> Tensor:
    """x^T y of each pair (n x R fp32) over each member's r columns, from `first` on: pairs x members x r x r, fp64."""
    n, tiles = len(pairs[0][0]), blocks(r, BLOCK_R)
    chunks = max(1, blocks(n, CHUNK_N))
    out = torch.empty((chunks, len(pairs), len(first), r, r), dtype=torch.float64, device=first.device)
    for index, (x, y) in enumerate(pairs):
        launch(
            _inner_kernel, (tiles * tiles, len(first), chunks), x, y, first, out[:, index], n, r, *x.stride(),
            *y.stride(), out.stride(0), CHUNK=CHUNK_N, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, **LAUNCH,
        )  # fmt: skip
    return out.sum(0)


def group_sums(a: Tensor, b: Tensor, z: Tensor, first: Tensor, rank: int) -> Tensor:
    """Of each delta of a rank, fp64, 7 x members: |D|^2, <P D, D> |V|_F, |P D|^2 |V|_F^2, sum |b_i|^2 |a_i|^2, and the
    mean squares of A, B and Z."""
    gram_a, grams = _inner_triton([(a, a)], first, rank), _inner_triton([(b, b), (b, z), (z, z)], first, rank)
    out = torch.empty((7, len(first)), dtype=torch.float64, device=a.device)
    launch(_sums_kernel, (len(first), 3), gram_a, grams, out, rank * rank, BLOCK=BLOCK_SUM, **LAUNCH)
    a_squares, b_squares, _, z_squares = torch.cat((gram_a, grams)).diagonal(dim1=-2, dim2=-1)
    out[3] = (a_squares * b_squares).sum(-1)
    for row, (squares, x) in enumerate(((a_squares, a), (b_squares, b), (z_squares, z)), start=4):
        out[row] = squares.sum(-1) / max(1, len(x) * rank)
    return out
