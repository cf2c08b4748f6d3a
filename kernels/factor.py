"""The factor U of a Gram matrix: upper triangular, (H + damp)^-1 = U^T U.

With J the reversal of order, J H J = L L^T (one Cholesky) gives H = R R^T for R = J L J, upper triangular, and
U = R^-1 = J L^-1 J (one triangular inverse). The published way, Cholesky, inverse, Cholesky again, costs twice as much
and is worse conditioned. Shapes: H, L, U are I x I, fp32.

Why fp32: damping keeps the condition number of H below I / percdamp, and on every published case the factor in fp32
gives the same selections as one in fp64, and values well inside the tolerance (5e-6 of the change's norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

LADDER = (1.0, 10.0, 100.0)
LEAF = 256  # below this size a triangular inverse is one solve
PANEL = 256  # rows reversed at a time


class NotPositiveDefiniteError(ValueError):
    """A Gram matrix that no damping of the ladder makes positive definite."""


class NonFiniteGramError(ValueError):
    """A Gram matrix with infinite or NaN entries."""


@dataclass(frozen=True)
class Factor:
    """U of one Gram matrix, and how it was reached.

    Attributes:
        u: I x I fp32, upper triangular, zeros below the diagonal.
        damping: the fraction of the mean diagonal that was added to the diagonal.
        attempts: every such fraction tried, in order; the last is `damping`.
    """

    u: torch.Tensor
    damping: float
    attempts: tuple[float, ...]

    @cached_property
    def cost(self) -> torch.Tensor:
        """The price of changing a weight of each column, 1 / diag(U)^2: I values, fp64, on the CPU."""
        return self.u.diagonal().cpu().double().square().reciprocal()


def _invert_upper_(upper: torch.Tensor) -> None:
    """Replace an upper triangular matrix by its inverse, in place: n^3 / 3 operations, against n^3 for solving eye.

    [[P, Q], [0, R]]^-1 = [[P^-1, -P^-1 Q R^-1], [0, R^-1]].
    """
    n = len(upper)
    if n <= LEAF:
        eye = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    mid = n // 2
    first, cross, last = upper[:mid, :mid], upper[:mid, mid:], upper[mid:, mid:]
    solved = torch.linalg.solve_triangular(first, cross, upper=True)
    cross.copy_(torch.linalg.solve_triangular(last, solved, upper=True, left=False).neg_())
    _invert_upper_(first)
    _invert_upper_(last)


def _reverse(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """target = J source J, a panel at a time, so that no third matrix of this size is needed."""
    n = len(source)
    for lo in range(0, n, PANEL):
        hi = min(lo + PANEL, n)
        target[lo:hi] = source[n - hi : n - lo].flip(0, 1)
    return target


def safety_factor(gram: torch.Tensor, percdamp: float = 0.01, *, ladder: tuple[float, ...] = LADDER) -> Factor:
    """Factor a Gram matrix: U upper triangular with (H + damp)^-1 = U^T U.

    Inputs that were never active (zeros on the diagonal) get 1 there; then `percdamp` times the mean of the diagonal
    is added to it. Where H is still not positive definite, `percdamp` times each further rung of `ladder` is tried.

    Args:
        gram: I x I fp32; only the upper triangle is read. Unchanged.
        percdamp: damping as a fraction of the mean diagonal, > 0.
        ladder: multiples of `percdamp`, in the order they are tried.

    Needs memory for two more I x I fp32 matrices, one of them the result.

    Example:
        gram = [[3, 0], [0, 1]], percdamp = 0.5 gives damp 1 and U = [[0.5, 0], [0, sqrt(0.5)]].

    Raises:
        ValueError: `gram` is no square fp32 matrix, or `percdamp` is not positive.
        NonFiniteGramError: the Gram holds infinite or NaN values.
        NotPositiveDefiniteError: every rung failed.
    """
    if gram.dtype != torch.float32 or gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square fp32 matrix, got {tuple(gram.shape)} {gram.dtype}")
    if not 0 < percdamp < math.inf:
        raise ValueError(f"percdamp must be positive and finite, got {percdamp}")
    diagonal = gram.diagonal().double()
    # A finite diagonal bounds the other entries of a true Gram; a damaged file is caught after a failed Cholesky.
    if not diagonal.isfinite().all():
        raise NonFiniteGramError(f"{int((~diagonal.isfinite()).sum())} of {len(gram)} diagonal entries are not finite")
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    attempts = []
    work = torch.empty_like(gram, memory_format=torch.contiguous_format)
    for rung in ladder:
        attempts.append(percdamp * rung)
        _reverse(gram, work).diagonal().copy_((diagonal + attempts[-1] * diagonal.mean()).flip(0))
        # The transposed view is column-major, as LAPACK and cuSOLVER want it: L^T then overwrites it without a copy.
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        transposed, _ = torch.linalg.cholesky_ex(work.T, upper=True, out=(work.T, info))
        if int(info) == 0:
            _invert_upper_(transposed)
            u = _reverse(transposed.T, torch.empty_like(work))
            return Factor(u, attempts[-1], tuple(attempts))
    if not gram.triu().isfinite().all():
        raise NonFiniteGramError("entries above the diagonal are not finite")
    raise NotPositiveDefiniteError(f"not positive definite with damping {', '.join(f'{a:g}' for a in attempts)}")
