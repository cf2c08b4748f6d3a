"""The gate of SafeLoRA (arXiv 2405.16833, section 3) and SafeMERGE (arXiv 2503.17239, section 3).

    cosine = <P D, D> / (|P D|_F |D|_F),    P = V V^T / |V|_F,    V = aligned - unaligned

For a LoRA delta D = B A nothing of D's shape is formed: with Z = V (V^T B), which is |V|_F P B,

    <P D, D> |V|_F   = sum((B^T Z) * (A A^T))
    |P D|^2 |V|_F^2  = sum((Z^T Z) * (A A^T))
    |D|^2            = sum((B^T B) * (A A^T))

and |V|_F cancels. The r x r Gram matrices end in fp64.

Squares of fp32 numbers below 1e-19 or above 1e19 leave fp32, and columns of B that cancel in D take their own rounding
errors along. Where the squares show either, the gate is computed again: V, D and B scaled by powers of two, which
changes no bit of a cosine, and D = (B R^T) Q^T with A^T = Q R, both in fp64, in place of B A. On a CPU alone: a device
would be waited for to see it.

Shapes: weights, V and D are O x I, B and Z are O x r, A is r x I.

Example: V = [[1, 0], [0, 2]], B = [[1], [1]] and A = [[1, 0]] give P D = [[1, 0], [4, 0]] / sqrt(5) and
cosine = 5 / sqrt(17 * 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from safeshard.kernels import coded_products, projection
from safeshard.kernels.alignment import tiles
from safeshard.kernels.alignment.coded import Weight, decoded
from safeshard.kernels.backend import Backend, blocks, launch, resolve, upload
from safeshard.kernels.lang import tl, triton
from safeshard.kernels.projection import WEIGHT_DTYPES

# Columns of a full delta that are projected at a time.
DENSE_COLUMNS = 1024

# Triton: rows of one product, rows of one program, the tile of a Gram matrix that a program owns, and how many entries
# of the Gram matrices are multiplied at a time.
BLOCK_N, CHUNK_N, BLOCK_R = 64, 1024, 16
BLOCK_SUM = 512
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}

# Mean squares of numbers that fp32 holds together with their squares, with room on both sides; and the least of
# |D|^2 / sum |b_i|^2 |a_i|^2 at which the rounding error of a b_i is still small beside D.
LEAST, MOST = 1e-30, 1e30
CANCELLED = 1e-2


class Gate(NamedTuple):
    """The alignment test of one delta."""

    cosine: Tensor
    """cos(P D, D), a 0-d fp64 tensor; NaN where D or V is zero or an input is not finite; 0 where only P D is zero."""
    projected: Tensor
    """P B (O x r) of a LoRA delta, P D (O x I) of a full one, in fp32; all zero where V is."""


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
    aligned: Weight, unaligned: Weight, adapters: Sequence[tuple[Tensor, Tensor]], *, backend: Backend = "auto"
) -> list[Gate]:
    """The gate of each LoRA delta B A against V = aligned - unaligned; V is read for all of them at once.

    A delta's scaling does not matter to the cosine and is not part of `projected`. The result of an adapter does not
    depend, to the bit, on the others.

    Args:
        aligned: O x I, bf16, fp16 or fp32 of any strides, or a quantised weight, which is decoded tile by tile.
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
    operands = (aligned, unaligned, *factors, *(a for a, _ in adapters))
    compute = _gates_triton if resolve(backend, *operands) == "triton" else _gates_torch
    gates, sound = compute(aligned, unaligned, adapters)
    if aligned.device.type == "cpu" and not all(good := sound.tolist()):
        plain = decoded(aligned), decoded(unaligned)
        if not torch.equal(*plain):
            v, exponent = _scaled(*plain)
            for index in (i for i, fine in enumerate(good) if not fine):
                gates[index] = _scaled_gate(v, exponent, *adapters[index], compute)
    return gates


Gates = tuple[list[Gate], Tensor]  # and which of them can be relied on: booleans


def _scaled(minuend: Tensor, subtrahend: Tensor) -> tuple[Tensor, int]:
    """minuend - subtrahend in fp32, times a power of two that makes its largest entry 1/2 to 1, and that exponent."""
    difference = minuend.float() - subtrahend.float()
    least, most = difference.aminmax() if difference.numel() else (difference.new_zeros(()),) * 2
    largest = max(abs(float(least)), abs(float(most)))
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    half = exponent // 2  # in two steps, for 2^-exponent may be more than fp32 holds
    return difference.mul_(2.0**-half).mul_(2.0 ** (half - exponent)), exponent


def _scaled_gate(
    v: Tensor,
    exponent: int,
    a: Tensor,
    b: Tensor,
    compute: Callable[[Tensor, Tensor, list[tuple[Tensor, Tensor]]], Gates],
) -> Gate:
    """The gate of one delta against V = v 2^exponent, from scaled factors, the delta's own right one orthonormal."""
    zero = v.new_zeros(())
    left, scale = _scaled(b, zero)
    if not (a.isfinite().all() and b.isfinite().all() and v.isfinite().all()):
        return Gate(v.new_full((), torch.nan, dtype=torch.float64), torch.full_like(left, torch.nan))
    q, r = torch.linalg.qr(a.T.double())
    own = b.double() @ r.T
    largest = float(own.abs().max()) if own.numel() else 0.0
    own = (own / 2.0 ** math.frexp(largest)[1]).float()
    (gate, other), _ = compute(v, zero.expand_as(v), [(q.T.float().contiguous(), own), (a, left)])
    return Gate(gate.cosine, (other.projected.double() * 2.0 ** (exponent + scale)).float())


def _fits(mean_square: Tensor) -> Tensor:
    """Whether numbers of this mean square, and their squares, are well inside of fp32's range."""
    return (mean_square >= LEAST) & (mean_square <= MOST)


def _gates_triton(aligned: Weight, unaligned: Weight, adapters: Sequence[tuple[Tensor, Tensor]]) -> Gates:
    """All deltas as one wide A and B, whose Gram matrices are formed in a few launches for each rank."""
    ranks = [b.shape[1] for _, b in adapters]
    firsts = list(accumulate(ranks, initial=0))
    members: dict[int, list[int]] = {}
    for index, rank in enumerate(ranks):
        members.setdefault(rank, []).append(index)
    order = [index for group in members.values() for index in group]
    a, b = torch.cat([a for a, _ in adapters]).float().T, projection.side_by_side([b for _, b in adapters])
    z, squared_norm = coded_products.project_wide(aligned, unaligned, b)
    places = upload(torch.tensor([firsts[index] for index in order]), a.device).split(list(map(len, members.values())))
    sums = [_group_sums(a, b, z, first, rank) for rank, first in zip(members, places, strict=True)]
    delta_squares, dots, projected_squares, apart, *means_of = torch.cat(sums, dim=1)
    means = torch.stack(means_of)
    cosines = _cosine(dots, projected_squares, delta_squares, squared_norm).unbind()
    sound = (means >= LEAST).all(0) & (means <= MOST).all(0) & (delta_squares >= CANCELLED * apart)
    sound &= _fits(squared_norm / max(1, aligned.numel()))
    projected = _split(_over_norm(z, squared_norm), ranks)
    at = {index: place for place, index in enumerate(order)}
    places_of, parts = [at[index] for index in range(len(adapters))], sound.unbind()
    gates = [Gate(cosines[p], projected[index]) for index, p in enumerate(places_of)]
    return gates, torch.stack([parts[p] for p in places_of])


def _split(wide: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """Each delta's columns; contiguous, which takes one launch, where all ranks are equal."""
    if len(set(ranks)) > 1:
        return wide.split(ranks, dim=1)
    return wide.view(len(wide), len(ranks), ranks[0]).transpose(0, 1).contiguous().unbind()


def _group_sums(a: Tensor, b: Tensor, z: Tensor, first: Tensor, rank: int) -> Tensor:
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


def _gates_torch(aligned: Weight, unaligned: Weight, adapters: Sequence[tuple[Tensor, Tensor]]) -> Gates:
    products, squared_norm = tiles.products(aligned, unaligned, [b for _, b in adapters])
    v_mean = squared_norm / max(1, aligned.numel())
    gates, sound = [], []
    for (a, b), z in zip(adapters, products, strict=True):
        a, b = a.float(), b.float()
        gram_a = _inner_torch(a.T, a.T)
        rank, both = len(gram_a), torch.cat((b, z), dim=1)
        gram = _inner_torch(both, both)  # of [B Z]: one product, for thin ones cost more to start than to compute
        delta_square, dot = (gram[:rank, :rank] * gram_a).sum(), (gram[:rank, rank:] * gram_a).sum()
        projected_square = (gram[rank:, rank:] * gram_a).sum()
        apart, z_mean = gram.diagonal()[:rank] @ gram_a.diagonal(), gram.diagonal()[rank:].sum() / max(1, z.numel())
        gates.append(Gate(_cosine(dot, projected_square, delta_square, squared_norm), _over_norm(z, squared_norm)))
        # Z is held in fp32, and squared in fp64; a delta of zero needs nothing.
        held = (z_mean >= LEAST * LEAST) & (z_mean <= MOST * MOST) & (delta_square >= CANCELLED * apart)
        sound.append((delta_square == 0) | (_fits(v_mean) & held))
    return gates, torch.stack(sound)


def _dense_products(
    aligned: Tensor, unaligned: Tensor, finetuned: Tensor, base: Tensor, implementation: Backend
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (columns, D[:, columns], (V V^T D)[:, columns], |V|_F^2) over all columns of D = finetuned - base."""
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
        delta = finetuned[:, strip].float() - base[:, strip].float()
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
    gate, sound = _dense_gate(aligned, unaligned, finetuned, aligned, project, implementation)
    if aligned.device.type != "cpu" or sound or torch.equal(aligned, unaligned) or torch.equal(aligned, finetuned):
        return gate
    (v, exponent), (delta, scale) = _scaled(aligned, unaligned), _scaled(finetuned, aligned)
    zero = v.new_zeros(()).expand_as(v)
    gate, _ = _dense_gate(v, zero, delta, zero, project, implementation)
    return Gate(gate.cosine, (gate.projected.double() * 2.0 ** (exponent + scale)).float())


def _dense_gate(
    aligned: Tensor, unaligned: Tensor, finetuned: Tensor, base: Tensor, project: bool, implementation: Backend
) -> tuple[Gate, Tensor]:
    """The gate of D = finetuned - base against V = aligned - unaligned, and whether fp32 held it."""
    projected = torch.empty(aligned.shape if project else 0, device=aligned.device)
    dot, projected_square, delta_square = torch.zeros((3,), dtype=torch.float64, device=aligned.device)
    squared_norm = torch.zeros((), dtype=torch.float64, device=aligned.device)
    for strip, delta, product, squared_norm in _dense_products(aligned, unaligned, finetuned, base, implementation):
        dot += _dot(product, delta)
        projected_square += _dot(product, product)
        delta_square += _dot(delta, delta)
        if project:
            projected[:, strip] = _over_norm(product, squared_norm)
    cosine = _cosine(dot, projected_square, delta_square, squared_norm)
    squares = torch.stack((squared_norm, projected_square, delta_square))
    return Gate(cosine, projected), _fits(squares / max(1, aligned.numel())).all()
