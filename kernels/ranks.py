"""Sums of LoRA deltas by their ranks: concatenated, and cut down again.

concatenate     the exact weighted sum of LoRA deltas B_i A_i, by concatenating ranks
truncate        the best approximation of a delta B A by one of lower rank (Eckart and Young, 1936)
truncate_dense  the same of a full delta
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import safeshard.kernels.ground.first_calls  # noqa: F401

# Columns of a full delta that are taken to fp64 at a time.
DENSE_COLUMNS = 1024


def concatenate(adapters: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(A, B) in fp32 with B A = sum_i weights[i] B_i A_i: ranks one after the other, the weights on B.

    Args:
        adapters: one or more pairs (A_i: r_i x I, B_i: O x r_i), bf16, fp16 or fp32.
        weights: one a pair.

    Raises:
        ValueError: numbers or shapes differ.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"adapters and weights must match, got {len(adapters)} and {len(weights)}")
    shapes = {(b.shape[0], a.shape[1]) for a, b in adapters}
    if len(shapes) != 1 or any(a.shape[0] != b.shape[1] for a, b in adapters):
        raise ValueError(f"adapters do not fit: A, B are {[(tuple(a.shape), tuple(b.shape)) for a, b in adapters]}")
    a = torch.cat([a.float() for a, _ in adapters])
    b = torch.cat([b.float() * weight for (_, b), weight in zip(adapters, weights, strict=True)], dim=1)
    return a, b


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of B A of the given rank, and what it loses.

    B = Q_b R_b and A^T = Q_a R_a reduce the delta to the r x r core R_b R_a^T, whose SVD is that of B A; in fp64.
    Each side gets the square roots of the singular values. The entry of largest magnitude in each column of B is
    positive, which fixes the signs. A delta of lower rank is padded with zeros.

    Args:
        a: r x I, bf16, fp16 or fp32.
        b: O x r.
        rank: at least 1.

    Returns:
        A (rank x I, fp32), B (O x rank, fp32) and |B A - result|_F / |B A|_F (0-d fp64; 0 for a zero delta).

    Raises:
        ValueError: shapes do not fit or the rank is below 1.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"A must be r x I and B O x r, got {tuple(a.shape)} and {tuple(b.shape)}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.T.double())
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    left, right = (q_b @ u[:, :kept]) * root, root[:, None] * (vh[:kept] @ q_a.T)
    signs = torch.where(left.gather(0, left.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    new_a, new_b = a.new_zeros((rank, a.shape[1]), dtype=torch.float32), b.new_zeros(b.shape[0], rank).float()
    new_b[:, :kept], new_a[:kept] = left * signs, right * signs.T
    return new_a, new_b, _lost(s[kept:].square().sum(), s.square().sum())


def truncate_dense(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a full delta of the given rank, and what it loses.

    The delta is projected on the leading eigenvectors of its smaller Gram matrix, which is formed in fp64: singular
    values below 1e-8 of the largest are not told from zero.

    Args:
        delta: O x I, bf16, fp16 or fp32.
        rank: at least 1.

    Returns:
        The approximation (O x I, fp32) and |delta - approximation|_F / |delta|_F (0-d fp64; 0 for a zero delta).

    Raises:
        ValueError: delta is not 2-D or the rank is below 1.
    """
    if delta.ndim != 2 or rank < 1:
        raise ValueError(f"delta must be 2-D and rank at least 1, got {tuple(delta.shape)} and {rank}")
    if delta.shape[0] > delta.shape[1]:
        low_rank, lost = truncate_dense(delta.T, rank)
        return low_rank.T, lost
    strips = delta.split(DENSE_COLUMNS, dim=1)
    gram = torch.zeros((len(delta), len(delta)), dtype=torch.float64, device=delta.device)
    for strip in strips:
        gram.addmm_(strip.double(), strip.double().T)
    basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    low_rank = torch.empty(delta.shape, device=delta.device)
    residual = torch.zeros((), dtype=torch.float64, device=delta.device)
    for strip, result in zip(strips, low_rank.split(DENSE_COLUMNS, dim=1), strict=True):
        exact = strip.double()
        approximation = basis @ (basis.T @ exact)
        residual += (exact - approximation).square().sum()
        result.copy_(approximation)
    return low_rank, _lost(residual, gram.diagonal().sum())


def _lost(cut: Tensor, total: Tensor) -> Tensor:
    """sqrt(cut / total) of squared norms, 0 where the total is."""
    return torch.where(total == 0, 0.0, cut / total).sqrt()
