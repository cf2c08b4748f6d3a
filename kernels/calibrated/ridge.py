"""Ridge: the delta that stays near the fine-tuned one and changes least on safe inputs, in closed form.

    X minimises |X - D|_F^2 + c tr(X H X^T):            X = D (I + c H)^-1
    with task inputs, tr((X - D) P (X - D)^T) + c ...:  X = D P (P + c H)^-1 = D - c D H (P + c H)^-1

c = penalty / mean(diag(H)); P is the Gram of inputs whose outputs must stay, scaled to a mean diagonal of 1, plus
ANCHOR_DAMPING on the diagonal, so that inputs that it does not cover stay near as well. It is the question that
Safe Delta (arXiv 2505.12038) approximates entry by entry, and the least squares of RegMean (arXiv 2212.09849) turned to
safety. On LoRA D = B A gives A' = A (I + c H)^-1 and B as it is: same rank, same shape, W never read.

One Cholesky for each Gram and penalty (I^3 / 3), two triangular solves for each row of D (2 I^2): LAPACK's and BLAS's
(cuSOLVER's and cuBLAS's), which no Triton kernel betters; `grams` shares both among adapters. The plain
form is fp32: the identity bounds the smallest eigenvalue, and with a few inputs a thousand times the others' size
(massive activations) X is within 1e-5 of fp64's up to a penalty of 1000, because Cholesky is as good as the matrix is
once its diagonal is scaled. With task inputs the smallest eigenvalue is ANCHOR_DAMPING, a condition that fp32 does not
bear: that form is computed in fp64.

Shapes: D and X are O x I, H and P I x I; all fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safeshard.kernels.calibrated.factor import LEAF, NonFiniteGramError, NotPositiveDefiniteError, cholesky_
from safeshard.kernels.calibrated.leak import Quadrature, quadratures
from safeshard.kernels.calibrated.stacks import stacked

ANCHOR_DAMPING = 1e-3
ROWS = 1024  # of a full delta, solved at a time


@dataclass(frozen=True)
class Ridge:
    """One Gram at one penalty, ready to be solved with.

    Attributes:
        r: I x I, upper triangular, R R^T = I + c H in fp32 or P + c H in fp64; undefined below the diagonal.
        c: the penalty by the mean diagonal of H.
        gram: H, where there is P.
    """

    r: torch.Tensor
    c: float
    gram: torch.Tensor | None = None

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """X for rows of D, or for A of a LoRA pair: k x I fp32, contiguous. Rows do not mix."""
        tiles = [self._apply(tile) for tile in torch.split(rows, ROWS)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        if self.gram is None:
            return _solve_left(self.r, _solve_right(self.r, rows))
        delta = rows.double()
        excited = _times_gram(delta, self.gram)
        return (delta - self.c * _solve_left(self.r, _solve_right(self.r, excited))).float()


def _solve_right(r: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Z with Z R^T = rows."""
    return torch.linalg.solve_triangular(r.T, rows, upper=False, left=False)


def _solve_left(r: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Z with Z R = rows."""
    return torch.linalg.solve_triangular(r, rows, upper=True, left=False)


def mean_diagonal(gram: torch.Tensor) -> float:
    """The mean of a Gram's diagonal.

    Raises:
        NonFiniteGramError: it holds infinite or NaN values.
    """
    diagonal = gram.diagonal().double()
    if not diagonal.isfinite().all():
        raise NonFiniteGramError(f"{int((~diagonal.isfinite()).sum())} of {len(gram)} diagonal entries are not finite")
    return float(diagonal.mean())


def ridge(gram: torch.Tensor, penalty: float, keep: torch.Tensor | None = None) -> Ridge:
    """Prepare the closed form of one Gram and one penalty.

    Args:
        gram: H, I x I fp32, symmetric. Unchanged; kept by the result where there is P.
        penalty: lambda >= 0, in units of the mean diagonal; 0 gives X = D up to rounding.
        keep: the Gram that P is made of, same shape; None for the plain form.

    Needs memory for one more I x I matrix, the result: fp32, or fp64 with P.

    Example:
        gram = [[3, 0], [0, 1]] and penalty = 2 make c = 1, and of D = [[1, 1]] X = [[0.25, 0.5]].

    Raises:
        ValueError: no square fp32 matrices of one shape, or a negative or infinite penalty.
        NonFiniteGramError: a Gram holds infinite or NaN values.
        NotPositiveDefiniteError: the penalty is so large that rounding hides the identity.
    """
    for name, matrix in (("gram", gram), ("keep", gram if keep is None else keep)):
        if matrix.dtype != torch.float32 or matrix.ndim != 2 or not matrix.shape[0] == matrix.shape[1] == len(gram):
            expected = "a square fp32 matrix" if name == "gram" else f"{tuple(gram.shape)} fp32"
            raise ValueError(f"{name} must be {expected}, got {tuple(matrix.shape)} {matrix.dtype}")
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty must be at least 0 and finite, got {penalty}")
    mean = mean_diagonal(gram)
    c = penalty / mean if mean > 0 else 0.0  # nothing excites the inputs
    work = _anchor(gram, keep)
    for lo in range(0, len(gram), LEAF):
        work[lo : lo + LEAF, lo:].add_(gram[lo : lo + LEAF, lo:], alpha=c)
    if not cholesky_(work):
        if not all(matrix.triu().isfinite().all() for matrix in (gram, gram if keep is None else keep)):
            raise NonFiniteGramError("entries above the diagonal are not finite")
        raise NotPositiveDefiniteError(f"not positive definite with penalty {penalty:g}")
    return Ridge(work, c, None if keep is None else gram)


def _anchor(gram: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The upper triangle of P, or of the identity; column-major, as LAPACK and cuSOLVER want it."""
    dtype = torch.float32 if keep is None else torch.float64
    work = torch.empty_like(gram, dtype=dtype, memory_format=torch.contiguous_format).T
    if keep is None:
        work.zero_().diagonal().fill_(1)
    else:
        mean = mean_diagonal(keep)
        for lo in range(0, len(keep), LEAF):
            work[lo : lo + LEAF, lo:].copy_(keep[lo : lo + LEAF, lo:]).mul_(1 / mean if mean > 0 else 0.0)
        work.diagonal().add_(ANCHOR_DAMPING)
    return work


def _times_gram(rows: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """rows H in fp64, without an fp64 copy of H."""
    return torch.cat([rows @ panel.double() for panel in torch.split(gram, LEAF, 1)], 1)


def spectra(deltas: Sequence[torch.Tensor], gram: torch.Tensor, keep: torch.Tensor | None = None) -> list[Quadrature]:
    """What decides how the energy of each delta falls with the penalty; nodes are in units of the mean diagonal of H.

    Args:
        deltas: Y of each (`safeshard.kernels.calibrated.leak`), k x I fp32. None changes what another gives.
        gram: H, I x I fp32, symmetric.
        keep: the Gram that P is made of: with P = R R^T the operator is R^-1 H R^-T, and the rows are Y R.
    """
    mean = mean_diagonal(gram) or 1.0
    if keep is None:
        found = quadratures(deltas, lambda many: stacked(many, lambda v: v @ gram, "product"))
    else:
        r = _anchor(gram, keep)
        if not cholesky_(r):
            raise NotPositiveDefiniteError("the Gram of the inputs to keep is not positive definite")

        def whitened(v: torch.Tensor) -> torch.Tensor:
            return _solve_right(r, _times_gram(_solve_left(r, v.double()), gram)).float()

        whole = r.triu()
        found = quadratures(
            [(rows.double() @ whole).float() for rows in deltas], lambda many: stacked(many, whitened, "whitened")
        )
    return [Quadrature(each.nodes / mean, each.weights * mean) for each in found]


def energies(found: Quadrature, penalties: torch.Tensor) -> torch.Tensor:
    """tr(X H X^T) at each penalty (fp64, on the CPU), from one of the `spectra`."""
    nodes, weights = found
    return (weights * nodes / (1 + penalties[:, None] * nodes).square()).sum(1)
