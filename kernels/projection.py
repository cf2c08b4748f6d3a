"""The product of every alignment test: V (V^T B) and |V|_F, for V = aligned - unaligned.

SafeLoRA (arXiv 2405.16833, section 3) and SafeMERGE (arXiv 2503.17239, section 3) project a delta B A with
P = V V^T / |V|_F. P (O x O) is never formed: `project` gives V (V^T B), which is |V|_F times the projected factor.

Shapes: aligned, unaligned and V are O x I (out features x in features), a factor B is O x r, Y = V^T B is I x r,
and Z = V Y is O x r.

Example: aligned = [[1, 0], [0, 2]], unaligned = 0 and B = [[1], [1]] give Y = [[1], [2]], Z = [[1], [4]] and |V|^2 = 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safeshard.kernels.alignment import tiles
from safeshard.kernels.alignment.coded import Coded, Weight
from safeshard.kernels.backend import Backend, blocks, launch, resolve, target
from safeshard.kernels.lang import GPUTarget, tl, triton

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Triton: rows and summed columns of one program's tile, and how many programs a launch aims at through splits of the
# summed axis. The split depends on V's shape alone, so that neither the device nor the other adapters of a batch change
# the result.
BLOCK_M, BLOCK_K = 64, 32
TARGET_PROGRAMS = 512
MAX_SPLITS = 16


def tile(architecture: GPUTarget, dtype: torch.dtype, r: int) -> dict[str, Any]:
    """How to launch the product of weights with an X of `r` columns: the tile's columns, precision, compiler's options.

    A wide tile converts and splits each entry of V once for more columns. It is as wide as registers allow, and its one
    group of four warps shares all of it: eight give both halves the whole work. An element's order of sums is the
    same for all.
    """
    nvidia = architecture.backend == "cuda"
    if nvidia:
        widest = 128 if architecture.arch in (90, 100, 103) else 64
    else:
        widest = 64 if architecture.warp_size == 64 else 32
    if dtype == torch.float32:  # twice the registers for what is loaded ahead
        widest //= 2
    return {
        "BLOCK_R": min(max(16, triton.next_power_of_2(r)), widest),
        # A product is three TF32 products on NVIDIA's tensor cores, together as exact as one in fp32; AMD has none.
        "PRECISION": "tf32x3" if nvidia else "ieee",
        "num_warps": 4,
        "num_stages": 3 if nvidia else 2,
        "enable_fp_fusion": True,
    }


class Projection(NamedTuple):
    """V (V^T B) for each factor B, not divided by |V|_F, and |V|_F^2."""

    projected: list[Tensor]
    """One fp32 tensor (O x r_k) a factor, in the order given."""
    squared_norm: Tensor
    """|V|_F^2, a 0-d fp64 tensor."""


@triton.jit
def _product_kernel(
    aligned_ptr,  # M x K, bf16/fp16/fp32, strided
    unaligned_ptr,  # M x K, bf16/fp16/fp32, strided
    x_ptr,  # K x R, fp32, contiguous
    partial_ptr,  # splits x M x R, fp32, contiguous
    squares_ptr,  # splits x (tiles of M), fp64, contiguous; unused unless NORM
    m,
    k,
    r,
    chunk,  # length of a split of K, a multiple of BLOCK_K
    aligned_stride_m,
    aligned_stride_k,
    unaligned_stride_m,
    unaligned_stride_k,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partial[split] = (aligned - unaligned)[:, split] x[split]; with NORM also the sum of the squared differences.

    Grid: (tiles of R, tiles of M, splits of K). Programs of one tile of V are neighbours, so that all but the first
    find it in the L2 cache. Differences and sums are fp32, squares end in fp64.
    """
    tile_r, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask, col_mask = (rows < m)[:, None], (cols < r)[None, :]
    rows_long = rows.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, k), BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inner_long = inner.to(tl.int64)
        mask = row_mask & (inner < k)[None, :]
        aligned_offsets = rows_long * aligned_stride_m + inner_long[None, :] * aligned_stride_k
        unaligned_offsets = rows_long * unaligned_stride_m + inner_long[None, :] * unaligned_stride_k
        v = tl.load(aligned_ptr + aligned_offsets, mask, 0.0).to(tl.float32)
        v -= tl.load(unaligned_ptr + unaligned_offsets, mask, 0.0).to(tl.float32)
        x = tl.load(x_ptr + inner_long[:, None] * r + cols[None, :], (inner < k)[:, None] & col_mask, 0.0)
        acc = tl.dot(v, x, acc, input_precision=PRECISION)
        if NORM:
            squares += v * v
    out = (split.to(tl.int64) * m + rows_long) * r + cols[None, :]
    tl.store(partial_ptr + out, acc, row_mask & col_mask)
    if NORM and tile_r == 0:
        tl.store(squares_ptr + split * tl.num_programs(1) + tile_m, tl.sum(squares.to(tl.float64)))


def splits_of(m: int, k: int) -> tuple[int, int]:
    """Into how many pieces a product of M x K sums its K axis, and a piece's length (a multiple of BLOCK_K)."""
    steps = blocks(k, BLOCK_K)
    splits = max(1, min(blocks(TARGET_PROGRAMS, max(1, blocks(m, BLOCK_M))), steps, MAX_SPLITS))
    return splits, blocks(steps, splits) * BLOCK_K


def _product_triton(aligned: Tensor, unaligned: Tensor, x: Tensor, *, norm: bool) -> tuple[Tensor, Tensor]:
    """(aligned - unaligned) x for M x K operands and a contiguous fp32 x (K x R), and, with norm, the partial sums of
    the squared norm."""
    (m, k), r = aligned.shape, x.shape[1]
    tiles_m, (splits, chunk) = blocks(m, BLOCK_M), splits_of(m, k)
    settings = tile(target(x.device), torch.promote_types(aligned.dtype, unaligned.dtype), r)
    partial = x.new_empty((splits, m, r))
    squares = x.new_empty((splits, tiles_m) if norm else (1,), dtype=torch.float64)
    strides = (*aligned.stride(), *unaligned.stride())
    # One column of programs at least, for the norm.
    grid = (max(1, blocks(r, settings["BLOCK_R"])), tiles_m, splits)
    launch(
        _product_kernel, grid, aligned, unaligned, x, partial, squares, m, k, r, chunk, *strides,
        NORM=norm, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, **settings,
    )  # fmt: skip
    return partial.sum(0), squares


def project_wide(aligned: Tensor, unaligned: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Triton: V (V^T B) for one contiguous fp32 B (O x R) of all factors side by side, and |V|_F^2 (0-d fp64).

    Two launches. A column's bits do not depend on the others.
    """
    y, squares = _product_triton(aligned.T, unaligned.T, wide, norm=True)
    z, _ = _product_triton(aligned, unaligned, y, norm=False)
    return z, squares.sum()


def _project_triton(aligned: Tensor, unaligned: Tensor, factors: Sequence[Tensor]) -> Projection:
    z, squared_norm = project_wide(aligned, unaligned, side_by_side(factors))
    return Projection(list(z.split([factor.shape[1] for factor in factors], dim=1)), squared_norm)


def side_by_side(factors: Sequence[Tensor]) -> Tensor:
    """All factors as one contiguous fp32 matrix, O x (r_1 + r_2 + ...), in one or two launches."""
    return torch.cat(list(factors), dim=1).float().contiguous()


def project(aligned: Tensor, unaligned: Tensor, factors: Sequence[Tensor], *, backend: Backend = "auto") -> Projection:
    """V (V^T B) for each factor B, and |V|_F^2, with V = aligned - unaligned taken in fp32.

    A factor's result does not depend, to the bit, on the other factors. V is never held in fp32 as a whole. Infinities
    and NaN in the inputs reach the outputs.

    Args:
        aligned: O x I, bf16, fp16 or fp32; any strides.
        unaligned: like `aligned`; its dtype may differ.
        factors: one or more tensors B, O x r_k, of the same dtypes.

    Raises:
        ValueError: shapes or dtypes do not fit, there is no factor, or the backend cannot run.
    """
    check_operands(aligned, unaligned, factors)
    if resolve(backend, aligned, unaligned, *factors) == "triton":
        return _project_triton(aligned, unaligned, factors)
    return Projection(*tiles.products(aligned, unaligned, factors))


def check_operands(aligned: Weight, unaligned: Weight, factors: Sequence[Tensor]) -> None:
    """Raise ValueError unless the shapes and dtypes are those that `project` documents, or weights are quantised."""
    if len(aligned.shape) != 2 or aligned.shape != unaligned.shape:
        raise ValueError(
            f"aligned and unaligned must be 2-D and of one shape, got {tuple(aligned.shape)}, {tuple(unaligned.shape)}"
        )
    if not factors:
        raise ValueError("at least one factor is needed")
    for factor in factors:
        if factor.ndim != 2 or factor.shape[0] != aligned.shape[0]:
            raise ValueError(f"a factor must be {aligned.shape[0]} x r, got {tuple(factor.shape)}")
    for tensor in (aligned, unaligned, *factors):
        if not isinstance(tensor, Coded) and tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"tensors must be bfloat16, float16 or float32, got {tensor.dtype}")
