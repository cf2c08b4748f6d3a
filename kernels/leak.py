"""The leak of an edit: the share of a delta's energy on safe inputs that the edit lets through.

    energy(D) = tr(D H D^T),   leak = sum over modules of energy(X) / sum over modules of energy(D)

D is the fine-tuned delta, X the delta written, H the Gram of the safe inputs. Only D^T D matters, so that a few rows Y
with Y^T Y = D^T D stand for D: r of a LoRA pair, and of a full delta its own rows, or random mixtures of them.

How the energy falls with a penalty c is an integral over the spectrum of H as D weighs it:

    energy(D (I + c H)^-1) = integral of w / (1 + c w)^2 dm(w),   m = sum over rows y and eigenpairs (w, q) of (y q)^2

Lanczos gives its Gauss quadrature (Golub and Meurant, Matrices, Moments and Quadrature, 2010) at a product with H a
step, where an eigendecomposition of H takes ten to thirty times a Cholesky: 32 steps are right to 1e-3 where at least
1 % is let through, over eight decades of eigenvalues.

Shapes: D and X are O x I, H is I x I, Y is k x I; all fp32. Sums over them are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from safeshard.kernels.factor import Factor

PROBES = 128  # random mixtures of the rows of a full delta that has more than twice as many
STEPS = 32


class Quadrature(NamedTuple):
    """Nodes and weights, fp64 on the CPU: the integral of f over the measure m is sum(weights * f(nodes))."""

    nodes: torch.Tensor
    weights: torch.Tensor


def lora_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The rows of a delta B A: R A, r x I fp32, with R^T R = B^T B.

    Args:
        a: A, r x I fp32.
        b: B with the scaling folded in, O x r fp32.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise ValueError(f"A must be r x I and B O x r, got {tuple(a.shape)} and {tuple(b.shape)}")
    b = b.double()
    values, vectors = torch.linalg.eigh(b.T @ b)
    return ((vectors * values.clamp_min(0).sqrt()).T @ a.double()).float()


def dense_rows(delta: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows that stand for a full delta: itself up to 2 * PROBES rows, else PROBES random mixtures of them.

    Mixtures have signs from `seed` alone: energies are right on average, and a module's own within some ten percent.

    Args:
        delta: D, O x I fp32.
        seed: of the mixtures; the same for deltas that are compared.
    """
    if len(delta) <= 2 * PROBES:
        return delta
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (PROBES, len(delta)), generator=generator, dtype=torch.int8).to(delta.device)
    return (2 * signs.float() - 1) @ delta / PROBES**0.5


def energy(rows: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(Y H Y^T).

    Args:
        rows: Y, k x I fp32.
        gram: H, I x I fp32, symmetric, on the same device.

    Example:
        rows = [[1, 2]], gram = [[3, 1], [1, 1]] gives 3 + 2 * 2 + 4 = 11.
    """
    return float(torch.sum((rows @ gram) * rows, dtype=torch.float64).clamp_min_(0))


def energy_by_factor(rows: torch.Tensor, factor: Factor) -> float:
    """tr(Y H Y^T) where of H only its factor is at hand: (H + damp)^-1 = U^T U, so |Y U^-1|^2 less what damping adds.

    Raises:
        ValueError: the factor does not say what was added to the diagonal.
    """
    if factor.added is None:
        raise ValueError("a factor that does not say what was added to the diagonal")
    whole = torch.linalg.solve_triangular(factor.u, rows, upper=True, left=False)
    squares = torch.sum(rows.square(), 0, dtype=torch.float64)
    return max(0.0, float(torch.sum(whole.square(), dtype=torch.float64) - squares @ factor.added))


def quadrature(rows: torch.Tensor, apply: Callable[[torch.Tensor], torch.Tensor], steps: int = STEPS) -> Quadrature:
    """The Gauss quadrature of an operator's spectrum, as all rows weigh it together: Lanczos on k x I matrices.

    Args:
        rows: Y, k x I fp32.
        apply: rows -> rows K, for a symmetric positive semidefinite K.
        steps: products, at most; fewer where the rows span less.
    """
    total = torch.sum(rows.square(), dtype=torch.float64)
    diagonal: list[torch.Tensor] = []
    beside: list[torch.Tensor] = []
    if total == 0:
        return Quadrature(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    current, before = rows / total.sqrt().float(), torch.zeros_like(rows)
    for _ in range(steps):
        product = apply(current)
        if beside:
            product -= beside[-1].float() * before
        diagonal.append(torch.sum(product * current, dtype=torch.float64))
        product -= diagonal[-1].float() * current
        beside.append(torch.sum(product.square(), dtype=torch.float64).sqrt())
        if beside[-1] <= 1e-7 * diagonal[0]:
            break
        before, current = current, product / beside[-1].float()
    main, off = torch.stack(diagonal).cpu(), torch.stack(beside[: len(diagonal) - 1] or [total * 0]).cpu()
    size = len(main)
    tridiagonal = torch.diag(main)
    if size > 1:
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return Quadrature(nodes.clamp_min(0), total.cpu() * vectors[0].square())
