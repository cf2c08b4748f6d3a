"""The published formulations, written from the papers: what the kernels replace, and are measured against.

SafeLoRA (arXiv 2405.16833) and SafeMERGE (arXiv 2503.17239) form P = V V^T / |V|_F; Safe Delta (arXiv 2505.12038)
sorts all entries of a block and compensates in steps of a few columns, as SparseGPT (arXiv 2301.00774) does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projection_matrix(aligned: Tensor, unaligned: Tensor) -> Tensor:
    """P (O x O, fp32)."""
    v = aligned.float() - unaligned.float()
    norm: Tensor = v.norm()
    return v @ v.T / norm


def gate(aligned: Tensor, unaligned: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """cos(P B A, B A) from P and both deltas in full."""
    delta = b @ a
    projected = projection_matrix(aligned, unaligned) @ delta
    return torch.nn.functional.cosine_similarity(projected.flatten(), delta.flatten(), dim=0)


def gram(x: Tensor) -> Tensor:
    """X^T X in fp32, both triangles."""
    rows = x.float()
    return rows.T @ rows


def factor(gram: Tensor, percdamp: float = 0.01) -> Tensor:
    """U by Cholesky, inverse, Cholesky."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    u: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return u


def safe_delta(
    delta: Tensor, u: Tensor, strength: float, block_size: int = 2048, step: int = 4
) -> tuple[Tensor, Tensor]:
    """(the delta written, the mask of entries kept): one sort of all entries a block, then steps of columns."""
    rows, width = delta.shape
    change, mask = torch.zeros_like(delta), torch.zeros_like(delta, dtype=torch.bool)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        price = u.diagonal()[start:stop].double().square().reciprocal()
        # Columns first, so that a stable sort keeps the order of rows within a column.
        losses = ((delta - change)[:, start:stop].double().square() * price).T.flatten()
        order = torch.argsort(price[:, None].expand(-1, rows).flatten(), stable=True)
        order = order[: len(order) - int(0.15 * len(order))]
        kept = order[losses[order].cumsum(0) <= price.mean() * strength / 2 * rows / 4096]
        taken = torch.zeros(len(losses), dtype=torch.bool, device=delta.device)
        taken[kept] = True
        mask[:, start:stop] = taken.view(stop - start, rows).T
        for lo in range(start, stop, step):
            hi = min(lo + step, stop)
            own = mask[:, lo:hi]
            error = torch.where(own, change[:, lo:hi] - delta[:, lo:hi], 0) / u.diagonal()[lo:hi]
            change[:, lo:hi] = torch.where(own, delta[:, lo:hi], change[:, lo:hi])
            change[:, hi:] -= error @ u[lo:hi, hi:]
    return change, mask
