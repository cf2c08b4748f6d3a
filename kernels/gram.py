"""Gram matrices of a linear layer's inputs: H += X^T X.

Source: the calibration matrix of OBS / SparseGPT (arXiv 2301.00774, section 3), which Safe Delta uses.
Shapes: x is n x I (n tokens, I input features), gram is I x I.

H is symmetric, so only its upper triangle is computed and read: below the diagonal a Gram's content is undefined
until `symmetrize` mirrors it, once, for those who want the whole matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from safeshard.kernels.backend import Backend, resolve

PANEL = 512  # columns a product of the torch implementation covers; narrower ones save work below the diagonal
SLAB = 2048  # rows converted to fp32 at a time

_SIGNATURE = {"gram_ptr": "*fp32", "n": "i32", "size": "i32", "stride_x": "i64", "stride_gram": "i64"}


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Launch settings by operand type: fp32 products run without tensor cores and want smaller tiles.

    Tiles of 128 x 128 spill registers where the row stride is not known to be a multiple of 16 bytes.
    """
    if dtype == torch.float32:
        return {"BLOCK_I": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_I": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _gram_kernel(
    x_ptr,  # (n, size) bf16, fp16 or fp32
    gram_ptr,  # (size, size) fp32, upper tiles are added to
    n,
    size,
    stride_x,
    stride_gram,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (tiles, tiles); one program owns one BLOCK_I x BLOCK_I tile on or above the diagonal. fp32 accumulation."""
    if tl.program_id(0) > tl.program_id(1):
        return
    row = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    col = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    acc = tl.zeros((BLOCK_I, BLOCK_I), dtype=tl.float32)
    for begin in range(0, n, BLOCK_N):
        token = begin + tl.arange(0, BLOCK_N).to(tl.int64)
        left = tl.load(
            x_ptr + token[:, None] * stride_x + row[None, :],
            mask=(token < n)[:, None] & (row < size)[None, :],
            other=0.0,
        )
        right = tl.load(
            x_ptr + token[:, None] * stride_x + col[None, :],
            mask=(token < n)[:, None] & (col < size)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    place = gram_ptr + row[:, None] * stride_gram + col[None, :]
    inside = (row < size)[:, None] & (col < size)[None, :]
    tl.store(place, tl.load(place, mask=inside) + acc, mask=inside)


COMPILE_CASES = [
    (
        _gram_kernel,
        {"x_ptr": pointer, **_SIGNATURE},
        {k: v for k, v in _tiles(dtype).items() if k.startswith("BLOCK")},
        {k: v for k, v in _tiles(dtype).items() if k.startswith("num")},
    )
    for pointer, dtype in (("*bf16", torch.bfloat16), ("*fp16", torch.float16), ("*fp32", torch.float32))
]


def _accumulate_triton(gram: torch.Tensor, x: torch.Tensor) -> None:
    if x.dtype == torch.bfloat16 and not isinstance(_gram_kernel, triton.JITFunction):
        x = x.float()  # Triton's interpreter multiplies the bit patterns of bf16 operands
    n, size = x.shape
    settings = _tiles(x.dtype)
    tiles = triton.cdiv(size, settings["BLOCK_I"])
    _gram_kernel[(tiles, tiles)](x, gram, n, size, x.stride(0), gram.stride(0), **settings)


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
        _accumulate_triton(gram, x if x.stride(1) == 1 else x.contiguous())
    else:
        _accumulate_torch(gram, x)


def symmetrize(gram: torch.Tensor) -> None:
    """Copy the upper triangle of `gram` (I x I) onto the lower one, in place, a panel at a time."""
    for lo in range(0, len(gram), PANEL):
        hi = min(lo + PANEL, len(gram))
        corner = gram[lo:hi, lo:hi].triu()
        gram[lo:hi, lo:hi] = corner + corner.triu(1).T
        gram[hi:, lo:hi] = gram[lo:hi, hi:].T
