"""LSSF (arXiv 2602.00038): the directions in which a layer answers safe inputs, and what alignment added in them.

    W H W^T = U diag(s) U^T,    p_i = s_i / sum(s),    k = the fewest with sum_{i <= k} h_i >= share * sum_i h_i,
    h_i = -p_i log p_i,         C = U_k^T (W - W_unaligned)

s_i is the energy of the layer's outputs along a direction, summed over the safe inputs. The small square is taken:
O x O, or, with W = Q R, R H R^T. An eigendecomposition in fp64, LAPACK's or cuSOLVER's: a few massive inputs give
energies over many decades, and fp32 would leave the lesser directions to rounding.

Shapes: W and W_unaligned are O x I in their dtype, H is I x I fp32, U is O x k and C k x I, fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from safeshard.kernels.calibrated.ridge import mean_diagonal
from safeshard.kernels.dense import tiles


class Subspace(NamedTuple):
    """U (O x k fp32, columns orthonormal, by falling energy), and how many directions the entropy asked for."""

    u: torch.Tensor
    asked: int


def subspace(weight: torch.Tensor, gram: torch.Tensor, share: float, most: int | None = None) -> Subspace:
    """The directions of most energy of a layer's outputs.

    Args:
        weight: W, O x I bf16, fp16 or fp32.
        gram: H, I x I fp32, symmetric.
        share: of the entropy of the energies, in (0, 1].
        most: the most directions to give, whatever the entropy asks for.

    Example:
        weight = [[2, 0], [0, 1]], gram = [[1, 0], [0, 1]]: energies 4 and 1 hold 36 and 64 % of their entropy, so that
        a share of 0.3 takes the first direction and one of 0.5 both.

    Raises:
        ValueError: shapes do not fit, or a share out of range.
        NonFiniteGramError: the Gram holds infinite or NaN values.
    """
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"weight must be O x I and gram I x I, got {tuple(weight.shape)} and {tuple(gram.shape)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    mean_diagonal(gram)
    w = weight.double()
    q, r = torch.linalg.qr(w) if w.shape[0] > w.shape[1] else (None, w)
    square = r @ gram.double() @ r.T
    energies, vectors = torch.linalg.eigh((square + square.T) / 2)
    asked = directions(energies.flip(0), share)
    taken = asked if most is None else min(asked, most)
    u = vectors.flip(1)[:, :taken]
    return Subspace((u if q is None else q @ u).float().contiguous(), asked)


def directions(energies: torch.Tensor, share: float) -> int:
    """How many of the energies, from the first on, hold a share of their entropy; none where there is no energy.

    Args:
        energies: falling, fp64; what is negative by rounding counts as 0.
    """
    energies = energies.clamp_min(0)
    total = energies.sum()
    if total == 0:
        return 0
    p = energies / total
    held = torch.special.entr(p).cumsum(0)
    below = int((held < share * held[-1] * (1 - 1e-12)).sum())  # rounding asks for no more
    return min(below + 1, int((p > 0).sum()))


def inside(u: torch.Tensor, aligned: torch.Tensor, unaligned: torch.Tensor) -> torch.Tensor:
    """C = U^T (aligned - unaligned), k x I fp32, without an fp32 copy of either."""
    found = torch.zeros(u.shape[1], aligned.shape[1], device=u.device)
    for rows in tiles(len(aligned)):
        found.addmm_(u[rows].T, aligned[rows].float() - unaligned[rows].float())
    return found


def add(weight: torch.Tensor, u: torch.Tensor, c: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Tiles of weight + U C, as `dtype`."""
    for rows in tiles(len(weight)):
        yield weight[rows].float().addmm(u[rows], c).to(dtype)
