"""Gram matrices of a linear layer's inputs: H += X^T X.

Source: the calibration matrix of OBS / SparseGPT (arXiv 2301.00774, section 3), which Safe Delta uses.
Shapes: x is n x I (n tokens, I input features), gram is I x I.

H is symmetric, so only its upper triangle is computed and read: below the diagonal a Gram's content is undefined
until `symmetrize` mirrors it, once, for those who want the whole matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from safeshard.kernels.backend import Backend, blocks, launch, resolve, target
from safeshard.kernels.lang import GPUTarget, tl, triton

PANEL = 512  # columns a product of the torch implementation covers; narrower ones save work below the diagonal
SLAB = 2048  # rows converted to fp32 at a time
VECTOR = 16  # values; the compiler loads 128 bits at a time where strides and widths are known multiples of it

GROUP = 8  # rows of tiles that programs pass through together, so that the columns they share stay in the L2 cache


def tile(architecture: GPUTarget, dtype: torch.dtype, *, whole: bool) -> dict[str, Any]:
    """How to launch by device and operand type.

    Wide tiles read each input less often. fp32 products run without tensor cores and want small ones, and so does a
    Gram whose rows are not `whole` vectors: it is added to value by value, and wide tiles have no registers for that.
    """
    nvidia = architecture.backend == "cuda"
    if dtype == torch.float32:
        edge, inner, warps, stages = 64 if nvidia or architecture.warp_size == 64 else 32, 16, 4, 2
    elif nvidia and whole:
        edge, inner, warps, stages = 128, 64, 8, 3
    else:
        edge, inner, warps, stages = 64, 64, 4, 3 if nvidia else 2
    return {"BLOCK_I": edge, "BLOCK_N": inner, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@triton.jit
def _gram_kernel(
    x_ptr,  # (n, width) bf16, fp16 or fp32; columns from `size` on are not used
    gram_ptr,  # (size, size) fp32, upper tiles are added to
    n,
    width,
    size,
    stride_x,
    stride_gram,
    GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (tiles x tiles,); one program owns one BLOCK_I x BLOCK_I tile on or above the diagonal. fp32 accumulation.

    Programs go down GROUP rows of tiles, then to the next column. Those below the diagonal end at once.
    """
    tiles = tl.cdiv(size, BLOCK_I)
    band, rest = tl.program_id(0) // (GROUP * tiles), tl.program_id(0) % (GROUP * tiles)
    height = tl.minimum(tiles - band * GROUP, GROUP)
    tile_row, tile_col = band * GROUP + rest % height, rest // height
    if tile_row > tile_col:
        return
    row = (tile_row * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    col = (tile_col * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    acc = tl.zeros((BLOCK_I, BLOCK_I), dtype=tl.float32)
    for begin in range(0, n, BLOCK_N):
        token = begin + tl.arange(0, BLOCK_N).to(tl.int64)
        left = tl.load(
            x_ptr + token[:, None] * stride_x + row[None, :],
            mask=(token < n)[:, None] & (row < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            x_ptr + token[:, None] * stride_x + col[None, :],
            mask=(token < n)[:, None] & (col < width)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    place = gram_ptr + row[:, None] * stride_gram + col[None, :]
    inside = (row < size)[:, None] & (col < size)[None, :]
    tl.store(place, tl.load(place, mask=inside) + acc, mask=inside)


def _accumulate_triton(gram: torch.Tensor, x: torch.Tensor) -> None:
    if x.dtype == torch.bfloat16 and not isinstance(_gram_kernel, triton.JITFunction):
        x = x.float()  # Triton's interpreter multiplies the bit patterns of bf16 operands
    size = len(gram)
    if x.stride(1) != 1 or x.stride(0) % VECTOR or size % VECTOR or x.storage_offset() % VECTOR:
        # Rows that begin anywhere would be loaded value by value; a copy whose rows begin at whole vectors is not.
        x = torch.nn.functional.pad(x, (0, -size % VECTOR)).contiguous()
    settings = tile(target(x.device), x.dtype, whole=gram.stride(0) % VECTOR == 0 and size % VECTOR == 0)
    tiles = blocks(size, settings["BLOCK_I"])
    launch(
        _gram_kernel, (tiles * tiles,), x, gram, len(x), x.shape[1], size, x.stride(0), gram.stride(0),
        GROUP=GROUP, **settings,
    )  # fmt: skip


def _accumulate_torch(gram: torch.Tensor, x: torch.Tensor) -> None:
    for slab in torch.split(x, SLAB):
        rows = slab.float()
        for lo in range(0, len(gram), PANEL):
            gram[lo : lo + PANEL, lo:].addmm_(rows[:, lo : lo + PANEL].T, rows[:, lo:])


def accumulate(gram: torch.Tensor, x: torch.Tensor, *, backend: Backend = "auto") -> None:
    """Add X^T X to the upper triangle of `gram`, in place.

    Products of bf16 and fp16 inputs are exact in fp32; fp32 inputs are multiplied in full fp32, never TF32 in the
    Triton implementation. Sums are fp32.

    Args:
        gram: I x I fp32, zeros at the start; the part below the diagonal is left undefined.
        x: n x I bf16, fp16 or fp32; one row a token (padding already dropped), any n including 0.
        backend: see `safeshard.kernels.backend.resolve`.

    Example:
        x = [[1, 2], [3, 4]] adds [[10, 14], [-, 20]].

    Raises:
        ValueError: shapes or dtypes other than these, or a backend that cannot run.
    """
    if gram.dtype != torch.float32 or gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square fp32 matrix, got {tuple(gram.shape)} {gram.dtype}")
    if x.ndim != 2 or x.shape[1] != len(gram):
        raise ValueError(f"x must be n x {len(gram)}, got {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bf16, fp16 or fp32, got {x.dtype}")
    if gram.stride(1) != 1:
        raise ValueError("gram must have contiguous rows")
    if resolve(backend, gram, x) == "triton":
        _accumulate_triton(gram, x)
    else:
        _accumulate_torch(gram, x)


def symmetrize(gram: torch.Tensor) -> None:
    """Copy the upper triangle of `gram` (I x I) onto the lower one, in place, a panel at a time."""
    for lo in range(0, len(gram), PANEL):
        hi = min(lo + PANEL, len(gram))
        corner = gram[lo:hi, lo:hi].triu()
        gram[lo:hi, lo:hi] = corner + corner.triu(1).T
        gram[hi:, lo:hi] = gram[lo:hi, hi:].T
