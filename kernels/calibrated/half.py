"""Symmetric matrices stored by half: what lies on and above the diagonal, a panel of rows after another.

    packed = [ H[0:p, 0:], H[p:2p, p:], ... ]      each panel row-major, its corner on the diagonal whole

A panel is one contiguous matrix, so that a file is written and read in blocks. Of n columns it takes
n (n + p) / 2 values about, p = 128.
Shapes: H is n x n, packed is flat; both fp32.
"""

from __future__ import annotations

import torch

from safeshard.kernels.backend import Backend, blocks, launch, resolve
from safeshard.kernels.lang import tl, triton

PANEL = 128
BLOCK = 64  # of the Triton kernels' tiles; divides PANEL, so that a tile's rows lie in one panel


@triton.jit
def _place(packed_ptr, row, col, size, PANEL: tl.constexpr):
    """Where entry (row, col) lies, col at or right of the first column of the row's panel; all int64."""
    panel = row // PANEL
    first = panel * PANEL
    start = first * size - PANEL * PANEL * (panel * (panel - 1) // 2)
    return packed_ptr + start + (row - first) * (size - first) + (col - first)


@triton.jit
def _pack_kernel(
    packed_ptr,  # flat fp32
    gram_ptr,  # (size, size) fp32; read on and above the diagonal
    size,
    stride_gram,
    PANEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tiles, tiles); one program moves one BLOCK x BLOCK tile of a panel."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (row < size) & (col < size) & (col >= row // PANEL * PANEL)
    low, high = tl.minimum(row, col), tl.maximum(row, col)
    values = tl.load(gram_ptr + low * stride_gram + high, mask=inside, other=0.0)
    tl.store(_place(packed_ptr, row, col, size, PANEL), values, mask=inside)


@triton.jit
def _unpack_kernel(
    packed_ptr,  # flat fp32
    gram_ptr,  # (size, size) fp32, written whole
    size,
    stride_gram,
    PANEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tiles, tiles); one program writes one tile on or above the diagonal, and its mirror."""
    if tl.program_id(0) > tl.program_id(1):
        return
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (row < size) & (col < size)
    values = tl.load(_place(packed_ptr, row, col, size, PANEL), mask=inside, other=0.0)
    tl.store(gram_ptr + row * stride_gram + col, values, mask=inside)
    tl.store(gram_ptr + tl.trans(col) * stride_gram + tl.trans(row), tl.trans(values), mask=tl.trans(inside))


_SETTINGS = {"PANEL": PANEL, "BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": True}


def packed_size(n: int) -> int:
    """Values that an n x n matrix takes when packed."""
    return sum(min(PANEL, n - lo) * (n - lo) for lo in range(0, n, PANEL))


def _panels(packed: torch.Tensor, n: int) -> list[torch.Tensor]:
    heights = [(min(PANEL, n - lo), n - lo) for lo in range(0, n, PANEL)]
    return [part.view(shape) for part, shape in zip(packed.split([h * w for h, w in heights]), heights, strict=True)]


def _pack_torch(gram: torch.Tensor, packed: torch.Tensor) -> None:
    for lo, panel in zip(range(0, len(gram), PANEL), _panels(packed, len(gram)), strict=True):
        panel.copy_(gram[lo : lo + PANEL, lo:])
        corner = panel[:, : len(panel)]
        corner.copy_(corner.triu() + corner.triu(1).T)


def _unpack_torch(packed: torch.Tensor, gram: torch.Tensor) -> None:
    for lo, panel in zip(range(0, len(gram), PANEL), _panels(packed, len(gram)), strict=True):
        gram[lo : lo + PANEL, lo:] = panel
        gram[lo + PANEL :, lo : lo + PANEL] = panel[:, PANEL:].T


def _grid(gram: torch.Tensor) -> tuple[int, int]:
    return blocks(len(gram), BLOCK), blocks(len(gram), BLOCK)


def pack(gram: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """The packed half of a symmetric matrix.

    Args:
        gram: n x n fp32 with contiguous rows; only the upper triangle is read.
        backend: see `safeshard.kernels.backend.resolve`.

    Example:
        [[1, 2], [-, 3]] gives [1, 2, 2, 3]: up to PANEL columns the one panel is all corner.

    Raises:
        ValueError: another shape, dtype or layout.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != torch.float32 or gram.stride(1) != 1:
        raise ValueError(f"gram must be square fp32 with contiguous rows, got {tuple(gram.shape)} {gram.dtype}")
    packed = torch.empty(packed_size(len(gram)), device=gram.device)
    if resolve(backend, gram) == "triton":
        launch(_pack_kernel, _grid(gram), packed, gram, len(gram), gram.stride(0), **_SETTINGS)
    else:
        _pack_torch(gram, packed)
    return packed


def unpack(packed: torch.Tensor, n: int, *, backend: Backend = "auto") -> torch.Tensor:
    """The n x n symmetric matrix of its packed half, the inverse of `pack`.

    Raises:
        ValueError: `packed` is not flat, contiguous fp32 of `packed_size(n)` values.
    """
    if packed.shape != (packed_size(n),) or packed.dtype != torch.float32 or not packed.is_contiguous():
        raise ValueError(f"packed must be {packed_size(n)} fp32 values, got {tuple(packed.shape)} {packed.dtype}")
    gram = torch.empty(n, n, device=packed.device)
    if resolve(backend, packed) == "triton":
        launch(_unpack_kernel, _grid(gram), packed, gram, len(gram), gram.stride(0), **_SETTINGS)
    else:
        _unpack_torch(packed, gram)
    return gram
