"""Compensation where all rows keep the same columns but those at the boundary (`selection="block"`), in delta space.

Source: the published loop of Safe Delta, which is OBS as SparseGPT (arXiv 2301.00774, section 3) runs it. For rows that
share the kept columns S it equals one triangular solve and one product:

    E tri(U_SS) = (X - D)_S,   X_rest -= E U_S,rest,   X_S = D_S

with U's entries within each sub-block of `sub_block` columns left out (the published approximation; 1 is exact OBS).
The solve and the product run over chunks of columns, so that no work is spent below U's diagonal.
Shapes: X is k x I, D k x n in a block of n columns, U I x I; all fp32.
"""

from __future__ import annotations

import torch

from safeshard.kernels.backend import upload
from safeshard.kernels.safedelta.row_compensation import CHUNK
from safeshard.kernels.safedelta.selection import BlockSelection


def _drop_within_sub_blocks(spread: torch.Tensor, kept: torch.Tensor, width: int, sub_block: int) -> None:
    """Zero what the kept columns of a chunk (rows of `spread`) would do to others of their own sub-block."""
    columns = torch.arange(width, device=spread.device)
    same = (kept // sub_block)[:, None] == (columns // sub_block)[None, :]
    same &= kept[:, None] != columns[None, :]
    spread[:, :width].masked_fill_(same, 0)


def _solve(tri: torch.Tensor, rhs: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """E with E tri = rhs, where the columns `absent` are not taken: E is 0 there."""
    if len(absent):
        tri = tri.clone().index_fill_(1, absent, 0)
        tri.diagonal().index_fill_(0, absent, 1)
        rhs.index_fill_(1, absent, 0)
    return torch.linalg.solve_triangular(tri, rhs, upper=True, left=False)


def compensate_columns(
    change: torch.Tensor,
    target: torch.Tensor,
    u: torch.Tensor,
    start: int,
    selection: BlockSelection,
    head: int,
    middle: int,
    sub_block: int,
) -> None:
    """Set the selected columns of one block of `change` to `target` and compensate later columns, in place.

    Args:
        change: X, k x I fp32 (k rows of the weight, or of groups in LoRA space).
        target: D in the block, k x n fp32.
        u: I x I fp32, upper triangular.
        start: first column of the block.
        selection: the block's columns.
        head: how many of the k rows, from the first, also take the columns of the boundary.
        middle: how many rows after those take the first `selection.extra` of them.
        sub_block: 1 ... 128 columns that do not affect each other.
    """
    n, device = len(selection.taken), u.device
    stop, boundary, extra = start + n, selection.boundary, selection.extra
    groups = [  # rows, and the columns that they lack
        (rows, lacks)
        for rows, lacks in (
            (slice(0, head), boundary[:0]),
            (slice(head, head + middle), boundary[extra:]),
            (slice(head + middle, len(change)), boundary),
        )
        if rows.start < rows.stop
    ]
    taken = selection.taken.clone()
    taken[boundary if head else boundary[: extra if middle else 0]] = True
    columns = taken.nonzero().flatten()  # on the CPU, where the selection is: nothing here waits for a device
    index = upload(columns, device)
    block, errors = change[:, start:stop], []
    chunk = CHUNK // sub_block * sub_block
    for lo in range(0, n, chunk):
        first, last = torch.searchsorted(columns, torch.tensor([lo, lo + chunk])).tolist()
        if first == last:
            continue
        own = index[first:last]
        spread = u[:, start + lo : stop].index_select(0, start + own)
        _drop_within_sub_blocks(spread, own - lo, min(chunk, n - lo), sub_block)
        tri = spread.index_select(1, own - lo)
        error = block.index_select(1, own).sub_(target.index_select(1, own))
        lacking = [torch.isin(columns[first:last], lacks).nonzero().flatten() for _, lacks in groups]
        if any(map(len, lacking)):
            parts = zip(groups, lacking, strict=True)
            error = torch.cat([_solve(tri, error[rows], upload(absent, device)) for (rows, _), absent in parts])
        else:
            error = _solve(tri, error, lacking[0])
        block[:, lo:].addmm_(error, spread, alpha=-1)
        errors.append(error)
    for rows, lacks in groups:
        kept = upload(columns[~torch.isin(columns, lacks)], device)
        block[rows].index_copy_(1, kept, target[rows].index_select(1, kept))
    if errors and stop < change.shape[1]:
        rest = u[:, stop:].index_select(0, start + index)
        change[:, stop:].addmm_(torch.cat(errors, 1), rest, alpha=-1)
