"""The gate of a full delta: formula and sources as in `kernels/gate.py`, D as it is.

<P D, D> and the norms are summed over strips of columns of D and of V V^T D.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safeshard.kernels import projection
from safeshard.kernels.alignment.cosine import Gate, cosine, fits, over_norm, scaled
from safeshard.kernels.backend import Backend, resolve

# Columns of a full delta that are projected at a time.
DENSE_COLUMNS = 1024


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
    (v, exponent), (delta, scale) = scaled(aligned, unaligned), scaled(finetuned, aligned)
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
            projected[:, strip] = over_norm(product, squared_norm)
    result = cosine(dot, projected_square, delta_square, squared_norm)
    squares = torch.stack((squared_norm, projected_square, delta_square))
    return Gate(result, projected), fits(squares / max(1, aligned.numel())).all()
