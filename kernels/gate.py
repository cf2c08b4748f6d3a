"""The gate of SafeLoRA (arXiv 2405.16833, section 3) and SafeMERGE (arXiv 2503.17239, section 3).

    cosine = <P D, D> / (|P D|_F |D|_F),    P = V V^T / |V|_F,    V = aligned - unaligned

For a LoRA delta D = B A nothing of D's shape is formed: with Z = V (V^T B), which is |V|_F P B,

    <P D, D> |V|_F   = sum((B^T Z) * (A A^T))
    |P D|^2 |V|_F^2  = sum((Z^T Z) * (A A^T))
    |D|^2            = sum((B^T B) * (A A^T))

and |V|_F cancels. The r x r Gram matrices end in fp64.

Shapes: weights, V and D are O x I, B and Z are O x r, A is r x I.

Example: V = [[1, 0], [0, 2]], B = [[1], [1]] and A = [[1, 0]] give P D = [[1, 0], [4, 0]] / sqrt(5) and
cosine = 5 / sqrt(17 * 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safeshard.kernels import projection
from safeshard.kernels.backend import Backend, resolve
from safeshard.kernels.projection import WEIGHT_DTYPES

# Columns of a full delta that are projected at a time.
DENSE_COLUMNS = 1024

# Triton: rows of one product, rows of one program, and the tile of a Gram matrix that a program owns.
BLOCK_N, CHUNK_N, BLOCK_R = 64, 1024, 16
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


class Gate(NamedTuple):
    """The alignment test of one delta."""

    cosine: Tensor
    """cos(P D, D), a 0-d fp64 tensor; NaN where D or V is zero or an input is not finite; 0 where only P D is zero."""
    projected: Tensor
    """P B (O x r) of a LoRA delta, P D (O x I) of a full one, in fp32; all zero where V is."""


@triton.jit
def _inner_kernel(
    x_ptr,  # n x r, fp32, strided
    y_ptr,  # n x r, fp32, strided
    partial_ptr,  # chunks x r x r, fp64, contiguous
    n,
    r,
    chunk,  # rows of a program, a multiple of BLOCK_N
    x_stride_n,
    x_stride_r,
    y_stride_n,
    y_stride_r,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partial[c] = x[c]^T y[c] over the c-th chunk of rows.

    Grid: (tiles of r, tiles of r, chunks). Each block of rows is multiplied in fp32 ("ieee") and added in fp64.
    """
    tile_x, tile_y, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols_x = tile_x * BLOCK_R + tl.arange(0, BLOCK_R)
    cols_y = tile_y * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, n), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        rows_long = rows.to(tl.int64)
        x_offsets = rows_long[None, :] * x_stride_n + cols_x.to(tl.int64)[:, None] * x_stride_r
        y_offsets = rows_long[:, None] * y_stride_n + cols_y.to(tl.int64)[None, :] * y_stride_r
        x = tl.load(x_ptr + x_offsets, (rows < n)[None, :] & (cols_x < r)[:, None], 0.0)
        y = tl.load(y_ptr + y_offsets, (rows < n)[:, None] & (cols_y < r)[None, :], 0.0)
        acc += tl.dot(x, y, input_precision="ieee").to(tl.float64)
    out = (part.to(tl.int64) * r + cols_x[:, None]) * r + cols_y[None, :]
    tl.store(partial_ptr + out, acc, (cols_x < r)[:, None] & (cols_y < r)[None, :])


def _inner_triton(x: Tensor, y: Tensor) -> Tensor:
    """x^T y (r x r, fp64) of two n x r fp32 tensors."""
    n, r = x.shape
    chunks, tiles = triton.cdiv(n, CHUNK_N), triton.cdiv(r, BLOCK_R)
    partial = x.new_empty((chunks, r, r), dtype=torch.float64)
    _inner_kernel[(tiles, tiles, chunks)](
        x, y, partial, n, r, CHUNK_N, *x.stride(), *y.stride(), BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, **LAUNCH
    )
    return partial.sum(0)


def _inner_torch(x: Tensor, y: Tensor) -> Tensor:
    """x^T y (r x r, fp64) of two n x r tensors."""
    return x.double().T @ y.double()


def _cosine(dot: Tensor, projected_square: Tensor, delta_square: Tensor, squared_norm: Tensor) -> Tensor:
    """dot / sqrt(projected_square delta_square); 0 where only the projection is zero, NaN where D or V is.

    Squares that cancel to a tiny negative number count as zero.
    """
    projected_square, delta_square = projected_square.clamp_min(0), delta_square.clamp_min(0)
    scale = projected_square.sqrt() * delta_square.sqrt()
    cosine = torch.where((projected_square == 0) & (delta_square > 0), 0.0, dot / scale)
    return torch.where(torch.isfinite(scale) & (squared_norm > 0), cosine, torch.nan)


def _over_norm(product: Tensor, squared_norm: Tensor) -> Tensor:
    """V (V^T B) / |V|_F, and zero for V = 0."""
    return product / torch.where(squared_norm == 0, 1.0, squared_norm).sqrt().to(product.dtype)


def lora_gate(
    aligned: Tensor, unaligned: Tensor, adapters: Sequence[tuple[Tensor, Tensor]], *, backend: Backend = "auto"
) -> list[Gate]:
    """The gate of each LoRA delta B A against V = aligned - unaligned; V is read for all of them at once.

    A delta's scaling does not matter to the cosine and is not part of `projected`. The result of an adapter does not
    depend, to the bit, on the others.

    Args:
        aligned: O x I, bf16, fp16 or fp32; any strides.
        unaligned: like `aligned`; its dtype may differ.
        adapters: one or more pairs (A: r_k x I, B: O x r_k) of the same dtypes.

    Raises:
        ValueError: shapes or dtypes do not fit, there is no adapter, or the backend cannot run.
    """
    factors = [b for _, b in adapters]
    projection.check_operands(aligned, unaligned, factors)
    for a, b in adapters:
        if a.ndim != 2 or a.shape != (b.shape[1], aligned.shape[1]) or a.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"A must be {b.shape[1]} x {aligned.shape[1]} and of {WEIGHT_DTYPES}, got {tuple(a.shape)}, {a.dtype}"
            )
    implementation = resolve(backend, aligned, unaligned, *factors, *(a for a, _ in adapters))
    products, squared_norm = projection.project(aligned, unaligned, factors, backend=implementation)
    inner = _inner_triton if implementation == "triton" else _inner_torch
    gates = []
    for (a, b), z in zip(adapters, products, strict=True):
        a, b = a.float(), b.float()
        gram_a = inner(a.T, a.T)
        rank, both = len(gram_a), torch.cat((b, z), dim=1)
        gram = inner(both, both)  # of [B Z]: one product, for thin ones cost more to start than to compute
        delta_square, dot = (gram[:rank, :rank] * gram_a).sum(), (gram[:rank, rank:] * gram_a).sum()
        projected_square = (gram[rank:, rank:] * gram_a).sum()
        gates.append(Gate(_cosine(dot, projected_square, delta_square, squared_norm), _over_norm(z, squared_norm)))
    return gates


def _dense_products(
    aligned: Tensor, unaligned: Tensor, finetuned: Tensor, implementation: Backend
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (columns, D[:, columns], (V V^T D)[:, columns], |V|_F^2) over all columns of D = finetuned - aligned."""
    rows, cols = aligned.shape
    strips = [slice(start, min(start + DENSE_COLUMNS, cols)) for start in range(0, cols, DENSE_COLUMNS)]
    by_gram = rows < cols
    if by_gram:
        gram = torch.zeros((rows, rows), device=aligned.device)
        for strip in strips:
            v = aligned[:, strip].float() - unaligned[:, strip].float()
            gram.addmm_(v, v.T)
        squared_norm = gram.diagonal().double().sum()
    for strip in strips:
        delta = finetuned[:, strip].float() - aligned[:, strip].float()
        if by_gram:
            product = gram @ delta
        else:
            (product,), squared_norm = projection.project(aligned, unaligned, [delta], backend=implementation)
        yield strip, delta, product, squared_norm


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of two fp32 matrices: fp32 along a row, fp64 over the rows."""
    return torch.linalg.vecdot(x, y).double().sum()


def dense_gate(
    aligned: Tensor, unaligned: Tensor, finetuned: Tensor, *, project: bool = False, backend: Backend = "auto"
) -> Gate:
    """The gate of the full delta D = finetuned - aligned against V = aligned - unaligned.

    D is taken in fp32, `DENSE_COLUMNS` columns at a time, and multiplied by V^T and V (I <= O) or by V V^T (O < I),
    whichever takes fewer operations. The second is torch's matrix product with either backend.

    Args:
        aligned: O x I, bf16, fp16 or fp32; any strides.
        unaligned: like `aligned`; its dtype may differ.
        finetuned: like `aligned`; its dtype may differ.
        project: also return P D; otherwise `projected` is an empty tensor.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend cannot run.
    """
    projection.check_operands(aligned, unaligned, [finetuned])
    if finetuned.shape != aligned.shape:
        raise ValueError(f"finetuned must be {tuple(aligned.shape)}, got {tuple(finetuned.shape)}")
    implementation = resolve(backend, aligned, unaligned, finetuned)
    projected = torch.empty(aligned.shape if project else 0, device=aligned.device)
    dot, projected_square, delta_square = torch.zeros((3,), dtype=torch.float64, device=aligned.device)
    for strip, delta, product, squared_norm in _dense_products(aligned, unaligned, finetuned, implementation):
        dot += _dot(product, delta)
        projected_square += _dot(product, product)
        delta_square += _dot(delta, delta)
        if project:
            projected[:, strip] = _over_norm(product, squared_norm)
    cosine = _cosine(dot, projected_square, delta_square, squared_norm)
    return Gate(cosine, projected)


def _compile_case(contiguous: str, other: str) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """One launch with n x r operands whose `contiguous` axis has stride 1."""
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "partial_ptr": "*fp64", "n": "i32", "r": "i32", "chunk": "i32"}
    signature |= {f"x_stride_{other}": "i32", f"y_stride_{other}": "i32"}
    constexprs = {f"x_stride_{contiguous}": 1, f"y_stride_{contiguous}": 1, "BLOCK_N": BLOCK_N, "BLOCK_R": BLOCK_R}
    return _inner_kernel, signature, constexprs, LAUNCH


COMPILE_CASES = [_compile_case("r", "n"), _compile_case("n", "r")]
