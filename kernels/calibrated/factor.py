"""The factor U of a Gram matrix: upper triangular, (H + damp)^-1 = U^T U.

H = R R^T with R upper triangular is a Cholesky factorisation from the last row up, and U = R^-1 a triangular inverse:
2/3 I^3 operations. The published way, Cholesky, inverse, Cholesky again, costs twice as much and is worse conditioned.
Both work by halves, on blocks, because LAPACK's own on one thread run at half the rate of a product.
Shapes: H, R, U are I x I, fp32.

Why fp32: damping keeps the condition number of H below I / percdamp, and on every golden case the factor in fp32 gives
the same selections as one in fp64, and values well inside the tolerance (5e-6 of the change's norm). Elsewhere,
columns whose prices are within about 1e-6 of each other can swap; where the budget ends between them one is kept
in place of the other; the published code, whose prices are in fp32 too, has the same doubt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

LADDER = (1.0, 10.0, 100.0)
LEAF = 256  # up to this size one call of LAPACK or one product; above it, halves, so that products do the work


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
        added: what was added to the Gram's diagonal, I values, fp64; None of a factor that does not say.
    """

    u: torch.Tensor
    damping: float
    attempts: tuple[float, ...]
    added: torch.Tensor | None = None

    @cached_property
    def cost(self) -> torch.Tensor:
        """The price of changing a weight of each column, 1 / diag(U)^2: I values, fp64, on the CPU."""
        return self.u.diagonal().cpu().double().square().reciprocal()


def _halves(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks P, Q, R of an upper triangular [[P, Q], [0, R]]; P is square."""
    mid = len(matrix) // 2
    return matrix[:mid, :mid], matrix[:mid, mid:], matrix[mid:, mid:]


def copy_upper(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle, a panel of rows at a time: the whole at once takes four times as long to transpose."""
    for lo in range(0, len(source), LEAF):
        target[lo : lo + LEAF, lo:].copy_(source[lo : lo + LEAF, lo:])
    return target


def cholesky_(h: torch.Tensor) -> bool:
    """Replace H by R, upper triangular with H = R R^T, in place; False where H is not positive definite.

    Args:
        h: I x I, column-major; only the upper triangle is read and written.
    """
    failures: list[torch.Tensor] = []
    _factor_(h, failures)
    return not torch.stack(failures).any()


def _factor_(h: torch.Tensor, failures: list[torch.Tensor]) -> None:
    """Replace H by R, upper triangular, H = R R^T, in place: n^3 / 3 operations. Only the upper triangle is read.

    Blocks: R of the last, then Q R^-T, then R of what that leaves of the first. A leaf is reversed, for LAPACK.
    """
    if len(h) <= LEAF:
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        failures.append(info)
        h.copy_(lower.flip(0, 1))
        return
    first, cross, last = _halves(h)
    _factor_(last, failures)
    torch.linalg.solve_triangular(last.T, cross, upper=False, left=False, out=cross)
    _subtract_square_(first, cross)
    _factor_(first, failures)


def _subtract_square_(h: torch.Tensor, x: torch.Tensor) -> None:
    """Subtract X X^T from the upper triangle of H."""
    if len(h) <= LEAF:
        h.addmm_(x, x.T, alpha=-1)
        return
    first, cross, last = _halves(h)
    upper, lower = x[: len(first)], x[len(first) :]
    _subtract_square_(first, upper)
    cross.addmm_(upper, lower.T, alpha=-1)
    _subtract_square_(last, lower)


def _invert_(r: torch.Tensor) -> None:
    """Replace an upper triangular matrix by its inverse, in place: n^3 / 3 operations, against n^3 for solving eye.

    [[P, Q], [0, R]]^-1 = [[P^-1, -P^-1 Q R^-1], [0, R^-1]].
    """
    if len(r) <= LEAF:
        eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
        r.copy_(torch.linalg.solve_triangular(r, eye, upper=True))
        return
    first, cross, last = _halves(r)
    _invert_(first)
    _multiply_(first, cross)
    torch.linalg.solve_triangular(last, cross.neg_(), upper=True, left=False, out=cross)
    _invert_(last)


def _multiply_(upper: torch.Tensor, x: torch.Tensor) -> None:
    """Replace X by its product with an upper triangular matrix, in place."""
    if len(upper) <= LEAF:
        x.copy_(upper @ x)
        return
    first, cross, last = _halves(upper)
    above, below = x[: len(first)], x[len(first) :]
    _multiply_(first, above)
    above.addmm_(cross, below)
    _multiply_(last, below)


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
    work = torch.empty_like(gram, memory_format=torch.contiguous_format).T  # column-major, as LAPACK and cuSOLVER want
    for rung in ladder:
        attempts.append(percdamp * rung)
        damped = diagonal + attempts[-1] * diagonal.mean()
        copy_upper(gram, work).diagonal().copy_(damped)
        if cholesky_(work):
            _invert_(work)
            u = copy_upper(work, torch.empty_like(work.T)).triu_()
            return Factor(u, attempts[-1], tuple(attempts), damped - gram.diagonal().double())
    if not gram.triu().isfinite().all():
        raise NonFiniteGramError("entries above the diagonal are not finite")
    raise NotPositiveDefiniteError(f"not positive definite with damping {', '.join(f'{a:g}' for a in attempts)}")
