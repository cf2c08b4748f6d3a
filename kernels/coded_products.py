"""V (V^T B) and |V|_F^2 where aligned or unaligned is quantised: codes are decoded in registers, as they are loaded.

Formula and sources as in `kernels/projection.py`; V = aligned - unaligned, each decoded in fp32 as
`kernels/alignment/coded.py` does it, so that no decoded weight is in a device's memory.

Shapes: weights are O x I, of codes O x I (e4m3, or plain numbers) or O x I/2 (e2m1); a factor B is O x r, Y = V^T B is
I x r, and Z = V Y is O x r. A kernel's product is M x K times K x R: V^T (M = I) in the first, V (M = O) in the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels import projection
from safeshard.kernels.alignment import tiles
from safeshard.kernels.alignment.coded import Weight
from safeshard.kernels.backend import Backend, blocks, launch, resolve, target
from safeshard.kernels.lang import tl, triton
from safeshard.kernels.projection import BLOCK_K, BLOCK_M, Projection, splits_of

PLAIN, E4M3, E2M1 = 0, 1, 2  # what a kernel's KIND means


@triton.jit
def _tile_of(
    codes_ptr,  # stored rows x columns, bf16/fp16/fp32, or uint8 codes
    scales_ptr,  # rows x columns of blocks, fp32 or uint8 exponents
    first_row,
    first_column,
    rows,
    columns,
    stride_row,
    stride_column,
    scale_stride_row,
    scale_stride_column,
    block_rows,  # that share a scale
    block_columns,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,  # of the tile that share a scale: ROWS or 1
    SHARED_COLUMNS: tl.constexpr,  # a divisor of COLUMNS
):
    """A tile of a weight in fp32, as it is stored; 0 outside of the weight."""
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    row_long = row.to(tl.int64)[:, None] * stride_row
    if KIND == 2:
        pair = first_column // 2 + tl.arange(0, COLUMNS // 2)
        mask = (row < rows)[:, None] & (pair < columns // 2)[None, :]
        byte = tl.load(codes_ptr + row_long + pair.to(tl.int64)[None, :] * stride_column, mask, 0).to(tl.int32)
        code = tl.interleave(byte & 15, byte >> 4)
        half = ((code & 7) << 9) | ((code & 8) << 12)
        value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        loaded = tl.load(codes_ptr + row_long + column.to(tl.int64)[None, :] * stride_column, mask, 0)
        if KIND == 1:
            code = loaded.to(tl.int32)
            half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
            value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
        else:
            value = loaded.to(tl.float32)
    if KIND != 0:
        # A scale for each SHARED_ROWS x SHARED_COLUMNS of the tile, then for each of its elements.
        down = first_row + tl.arange(0, ROWS // SHARED_ROWS) * SHARED_ROWS
        across = first_column + tl.arange(0, COLUMNS // SHARED_COLUMNS) * SHARED_COLUMNS
        at_row = (down // block_rows).to(tl.int64)[:, None] * scale_stride_row
        at_column = (across // block_columns).to(tl.int64)[None, :] * scale_stride_column
        inside = (down < rows)[:, None] & (across < columns)[None, :]
        scale = tl.load(scales_ptr + at_row + at_column, inside, 0)
        if KIND == 2:
            power = scale.to(tl.int32)
            bits = tl.where(power == 255, 0x7FC00000, tl.where(power == 0, 0x400000, power << 23))
            scale = bits.to(tl.float32, bitcast=True)
        if SHARED_COLUMNS != COLUMNS and SHARED_COLUMNS != 1:
            wide = tl.broadcast_to(scale[:, :, None], (ROWS // SHARED_ROWS, COLUMNS // SHARED_COLUMNS, SHARED_COLUMNS))
            scale = tl.reshape(wide, (ROWS // SHARED_ROWS, COLUMNS))
        value *= scale
    return value


@triton.jit
def _coded_product_kernel(
    aligned_ptr,  # O x I or O x I/2, strided
    aligned_scales_ptr,
    unaligned_ptr,  # O x I or O x I/2, strided
    unaligned_scales_ptr,
    x_ptr,  # K x R, fp32, contiguous
    partial_ptr,  # splits x M x R, fp32, contiguous
    squares_ptr,  # splits x (tiles of M), fp64, contiguous; unused unless TRANSPOSED
    o,
    i,
    r,
    chunk,  # length of a split of K, a multiple of BLOCK_K
    aligned_stride_o,
    aligned_stride_i,
    aligned_scale_stride_o,
    aligned_scale_stride_i,
    aligned_block_o,
    aligned_block_i,
    unaligned_stride_o,
    unaligned_stride_i,
    unaligned_scale_stride_o,
    unaligned_scale_stride_i,
    unaligned_block_o,
    unaligned_block_i,
    TRANSPOSED: tl.constexpr,  # V^T x and the norm, in place of V x
    ALIGNED: tl.constexpr,  # its kind
    ALIGNED_SHARED_O: tl.constexpr,
    ALIGNED_SHARED_I: tl.constexpr,
    UNALIGNED: tl.constexpr,
    UNALIGNED_SHARED_O: tl.constexpr,
    UNALIGNED_SHARED_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partial[split] = V[:, split] x[split], or V[split]^T x[split]; with the latter also the sum of V's squares.

    Grid: (tiles of R, tiles of M, splits of K), as `_product_kernel` in `kernels/projection.py`. Decoded values,
    differences and sums are fp32, squares end in fp64.
    """
    tile_r, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ROWS: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_M
    COLUMNS: tl.constexpr = BLOCK_M if TRANSPOSED else BLOCK_K
    m, k = (i, o) if TRANSPOSED else (o, i)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, k), BLOCK_K):
        first_o, first_i = (start, tile_m * BLOCK_M) if TRANSPOSED else (tile_m * BLOCK_M, start)
        v = _tile_of(
            aligned_ptr, aligned_scales_ptr, first_o, first_i, o, i, aligned_stride_o, aligned_stride_i,
            aligned_scale_stride_o, aligned_scale_stride_i, aligned_block_o, aligned_block_i,
            ALIGNED, ROWS, COLUMNS, ALIGNED_SHARED_O, ALIGNED_SHARED_I,
        )  # fmt: skip
        v -= _tile_of(
            unaligned_ptr, unaligned_scales_ptr, first_o, first_i, o, i, unaligned_stride_o, unaligned_stride_i,
            unaligned_scale_stride_o, unaligned_scale_stride_i, unaligned_block_o, unaligned_block_i,
            UNALIGNED, ROWS, COLUMNS, UNALIGNED_SHARED_O, UNALIGNED_SHARED_I,
        )  # fmt: skip
        inner = start + tl.arange(0, BLOCK_K)
        x_mask = (inner < k)[:, None] & (cols < r)[None, :]
        x = tl.load(x_ptr + inner.to(tl.int64)[:, None] * r + cols[None, :], x_mask, 0.0)
        if TRANSPOSED:
            acc = tl.dot(tl.trans(v), x, acc, input_precision=PRECISION)
            squares += v * v
        else:
            acc = tl.dot(v, x, acc, input_precision=PRECISION)
    out = (split.to(tl.int64) * m + rows.to(tl.int64)[:, None]) * r + cols[None, :]
    tl.store(partial_ptr + out, acc, (rows < m)[:, None] & (cols < r)[None, :])
    if TRANSPOSED and tile_r == 0:
        tl.store(squares_ptr + split * tl.num_programs(1) + tile_m, tl.sum(squares.to(tl.float64)))


def _operand(weight: Weight, name: str, tile: tuple[int, int]) -> tuple[list[Any], list[int], dict[str, int]]:
    """A weight as the kernel takes it: tensors, strides and block, and constants, for tiles of rows x columns."""
    if isinstance(weight, Tensor):
        kind, tensors, strides, block, shared = PLAIN, [weight, weight], [*weight.stride(), 0, 0], (1, 1), (1, 1)
    else:
        kind = E4M3 if weight.kind == "e4m3" else E2M1
        # A block that is all of an axis needs no division: its scale's stride is 0.
        whole = [step >= size for step, size in zip(weight.block, weight.shape, strict=True)]
        block = (1 if whole[0] else weight.block[0], 1 if whole[1] else weight.block[1])
        own = [0 if all_ else stride for all_, stride in zip(whole, weight.scales.stride(), strict=True)]
        tensors, strides = [weight.codes, weight.scales], [*weight.codes.stride(), *own]
        rows, columns = (size if all_ else gcd(size, step) for size, all_, step in zip(tile, whole, block, strict=True))
        shared = (rows if rows == tile[0] else 1, columns)
    return tensors, [*strides, *block], {name: kind, f"{name}_SHARED_O": shared[0], f"{name}_SHARED_I": shared[1]}


def _product(aligned: Weight, unaligned: Weight, x: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """V x, or V^T x and the partial sums of the squared norm, for a contiguous fp32 x."""
    (o, i), r = aligned.shape, x.shape[1]
    m, k = (i, o) if transposed else (o, i)
    tiles_m, (splits, chunk) = blocks(m, BLOCK_M), splits_of(m, k)
    architecture = target(x.device)
    settings = projection.tile(architecture, torch.float32, r)
    if architecture.backend == "cuda" and architecture.arch in (
        100,
        103,
    ):  # whose compiler gives four warps 80 registers
        settings["num_warps"] = 8
    partial = x.new_empty((splits, m, r))
    squares = x.new_empty((splits, tiles_m) if transposed else (1,), dtype=torch.float64)
    tile = (BLOCK_K, BLOCK_M) if transposed else (BLOCK_M, BLOCK_K)
    a, a_sizes, a_constants = _operand(aligned, "ALIGNED", tile)
    u, u_sizes, u_constants = _operand(unaligned, "UNALIGNED", tile)
    grid = (max(1, blocks(r, settings["BLOCK_R"])), tiles_m, splits)
    launch(
        _coded_product_kernel, grid, *a, *u, x, partial, squares, o, i, r, chunk, *a_sizes, *u_sizes,
        TRANSPOSED=transposed, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, **a_constants, **u_constants, **settings,
    )  # fmt: skip
    return partial.sum(0), squares


def project_wide(aligned: Weight, unaligned: Weight, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Triton: V (V^T B) for one contiguous fp32 B (O x R) of all factors side by side, and |V|_F^2 (0-d fp64).

    Two launches. A column's bits do not depend on the others.
    """
    if isinstance(aligned, Tensor) and isinstance(unaligned, Tensor):
        return projection.project_wide(aligned, unaligned, wide)
    y, squares = _product(aligned, unaligned, wide, transposed=True)
    z, _ = _product(aligned, unaligned, y, transposed=False)
    return z, squares.sum()


def project(aligned: Weight, unaligned: Weight, factors: Sequence[Tensor], *, backend: Backend = "auto") -> Projection:
    """V (V^T B) for each factor B, and |V|_F^2, with V = aligned - unaligned of decoded weights, in fp32.

    A factor's result does not depend, to the bit, on the other factors. Infinities and NaN reach the outputs.

    Args:
        aligned: O x I, in its codes, or bf16, fp16 or fp32; any strides.
        unaligned: like `aligned`; its format may differ.
        factors: one or more tensors B, O x r_k, bf16, fp16 or fp32.

    Raises:
        ValueError: shapes or dtypes do not fit, there is no factor, or the backend cannot run.
    """
    projection.check_operands(aligned, unaligned, factors)
    if resolve(backend, aligned, unaligned, *factors) == "torch":
        return Projection(*tiles.products(aligned, unaligned, factors))
    z, squared_norm = project_wide(aligned, unaligned, projection.side_by_side(factors))
    return Projection(list(z.split([factor.shape[1] for factor in factors], dim=1)), squared_norm)
