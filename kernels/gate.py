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
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from safeshard.kernels import coded_products, projection
from safeshard.kernels.alignment import tiles
from safeshard.kernels.alignment.coded import Weight, decoded
from safeshard.kernels.alignment.cosine import LEAST, MOST, Gate, cosine, fits, over_norm, scaled
from safeshard.kernels.alignment.sums import group_sums
from safeshard.kernels.backend import Backend, resolve, upload
from safeshard.kernels.dense_gate import DENSE_COLUMNS, dense_gate
from safeshard.kernels.projection import WEIGHT_DTYPES

__all__ = ["DENSE_COLUMNS", "Gate", "dense_gate", "lora_gate"]

# The least of |D|^2 / sum |b_i|^2 |a_i|^2 at which the rounding error of a b_i is still small beside D.
CANCELLED = 1e-2


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
            v, exponent = scaled(*plain)
            for index in (i for i, fine in enumerate(good) if not fine):
                gates[index] = _scaled_gate(v, exponent, *adapters[index], compute)
    return gates


Gates = tuple[list[Gate], Tensor]  # and which of them can be relied on: booleans


def _scaled_gate(
    v: Tensor,
    exponent: int,
    a: Tensor,
    b: Tensor,
    compute: Callable[[Tensor, Tensor, list[tuple[Tensor, Tensor]]], Gates],
) -> Gate:
    """The gate of one delta against V = v 2^exponent, from scaled factors, the delta's own right one orthonormal."""
    zero = v.new_zeros(())
    left, scale = scaled(b, zero)
    if not (a.isfinite().all() and b.isfinite().all() and v.isfinite().all()):
        return Gate(v.new_full((), torch.nan, dtype=torch.float64), torch.full_like(left, torch.nan))
    q, r = torch.linalg.qr(a.T.double())
    own = b.double() @ r.T
    largest = float(own.abs().max()) if own.numel() else 0.0
    own = (own / 2.0 ** math.frexp(largest)[1]).float()
    (gate, other), _ = compute(v, zero.expand_as(v), [(q.T.float().contiguous(), own), (a, left)])
    return Gate(gate.cosine, (other.projected.double() * 2.0 ** (exponent + scale)).float())


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
    sums = [group_sums(a, b, z, first, rank) for rank, first in zip(members, places, strict=True)]
    delta_squares, dots, projected_squares, apart, *means_of = torch.cat(sums, dim=1)
    means = torch.stack(means_of)
    cosines = cosine(dots, projected_squares, delta_squares, squared_norm).unbind()
    sound = (means >= LEAST).all(0) & (means <= MOST).all(0) & (delta_squares >= CANCELLED * apart)
    sound &= fits(squared_norm / max(1, aligned.numel()))
    projected = _split(over_norm(z, squared_norm), ranks)
    at = {index: place for place, index in enumerate(order)}
    places_of, parts = [at[index] for index in range(len(adapters))], sound.unbind()
    gates = [Gate(cosines[p], projected[index]) for index, p in enumerate(places_of)]
    return gates, torch.stack([parts[p] for p in places_of])


def _split(wide: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """Each delta's columns; contiguous, which takes one launch, where all ranks are equal."""
    if len(set(ranks)) > 1:
        return wide.split(ranks, dim=1)
    return wide.view(len(wide), len(ranks), ranks[0]).transpose(0, 1).contiguous().unbind()


def _gates_torch(aligned: Weight, unaligned: Weight, adapters: Sequence[tuple[Tensor, Tensor]]) -> Gates:
    products, squared_norm = tiles.products(aligned, unaligned, [b for _, b in adapters])
    v_mean = squared_norm / max(1, aligned.numel())
    gates, sound = [], []
    for (a, b), z in zip(adapters, products, strict=True):
        a, rank = a.double(), len(a)
        gram_a = a @ a.T
        both = z.new_empty((len(z), 2 * rank), dtype=torch.float64)
        both[:, :rank], both[:, rank:] = b, z
        gram = both.T @ both  # of [B Z]: one product, for thin ones cost more to start than to compute
        delta_square, dot = (gram[:rank, :rank] * gram_a).sum(), (gram[:rank, rank:] * gram_a).sum()
        projected_square = (gram[rank:, rank:] * gram_a).sum()
        apart, z_mean = gram.diagonal()[:rank] @ gram_a.diagonal(), gram.diagonal()[rank:].sum() / max(1, z.numel())
        gates.append(Gate(cosine(dot, projected_square, delta_square, squared_norm), over_norm(z, squared_norm)))
        # Z is held in fp32, and squared in fp64; a delta of zero needs nothing.
        held = (z_mean >= LEAST * LEAST) & (z_mean <= MOST * MOST) & (delta_square >= CANCELLED * apart)
        sound.append((delta_square == 0) | (fits(v_mean) & held))
    return gates, torch.stack(sound)
