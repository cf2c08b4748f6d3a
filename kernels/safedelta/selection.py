"""Which entries of the fine-tuned delta Safe Delta keeps.

Source: Safe Delta (ICML 2025), the greedy choice under a safety budget, in an exact short form. Keeping entry (i, j) of
the delta D, where X has been written so far, costs (D - X)_ij^2 / U_jj^2. The published order of all entries is by
1 / U_jj^2, which depends on the column alone, so sorting entries is sorting columns: whole columns are kept, cheapest
first, until the budget mean(1 / U_jj^2) * s / 2 * O / 4096 ends inside one boundary column. Its leading rows are kept.
Columns of one price (dead inputs all have the damping's) the published order, a stable sort of entries by rows, goes
through row by row, so they are one boundary: its leading rows, then the first columns of one more row.

Shapes: D and X are O x I (rows x columns), fp32; a block has n of the columns. Losses and budgets are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from safeshard.kernels.backend import Backend, blocks, launch, resolve, upload
from safeshard.kernels.lang import tl, triton

EXCLUDED = 0.15  # share of a block's entries, the costliest, that is never kept
REFERENCE_ROWS = 4096  # the budget is stated for a layer of this many rows
ROW_TILE = 64  # rows the torch implementations hold in fp64 at a time on a CPU, in its cache
DEVICE_ROW_TILE = 2048  # and on a device, where launches cost more than memory

_SLAB = 512  # rows one program of the Triton kernel sums
_LAUNCH = {"SLAB": _SLAB, "BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@dataclass(frozen=True)
class BlockSelection:
    """What one block of columns keeps: whole columns, and the leading rows of those at the boundary.

    Attributes:
        taken: n booleans, on the CPU: the whole columns.
        boundary: the columns of one price where the budget ends, counted within the block, ascending, on the CPU; most
            often one, none where all are taken. Only the first `head` rows of them are kept.
        head: how many.
        extra: of row `head` the first `extra` columns of the boundary are kept as well, fewer than there are.
        entries: entries kept in all.
        budget: the loss allowed.
        loss: the loss of what is kept.
    """

    taken: torch.Tensor
    boundary: torch.Tensor
    head: int
    extra: int
    entries: int
    budget: float
    loss: float

    def columns(self, row: int) -> torch.Tensor:
        """The columns kept in `row`: n booleans."""
        kept = self.taken.clone()
        kept[self.boundary[: len(self.boundary) if row < self.head else self.extra if row == self.head else 0]] = True
        return kept

    def mask(self, rows: int) -> torch.Tensor:
        """All entries kept: rows x n booleans, on the CPU."""
        kept = self.taken.repeat(rows, 1)
        kept[: self.head, self.boundary] = True
        kept[self.head : self.head + 1, self.boundary[: self.extra]] = True
        return kept


def select_block(
    cost: torch.Tensor,
    column_loss: torch.Tensor,
    boundary_loss: Callable[[torch.Tensor], torch.Tensor],
    rows: int,
    strength: float,
    *,
    part_rows: bool = True,
) -> BlockSelection:
    """Select the entries of one block (`selection="block"`, the published rule).

    Of columns with one cost the entries are kept row by row. At most n * rows - int(0.15 * n * rows) entries are kept.
    Strength 0 keeps none.

    Args:
        cost: n values 1 / U_jj^2, fp64, CPU.
        column_loss: n losses, each of a column over all rows, fp64, CPU.
        boundary_loss: gives the losses of k columns, by row: `rows` x k values, fp64, any device. Called at most once.
            They are added up on the CPU: a device's running sum differs from run to run.
        rows: O.
        strength: s >= 0.
        part_rows: keep a part of one more row of the boundary; False keeps whole rows alone.

    Example:
        cost [1, 4, 2], column_loss [3, 9, 4], rows 2, strength 8192: the budget is 7/3 * 4096 * 2 / 4096 = 14/3, so
        column 0 is kept and, of column 2, with losses [1, 3] by row, the first row.
    """
    n = len(cost)
    order = torch.argsort(cost, stable=True)
    total = torch.cumsum(column_loss[order], 0)
    budget = float(cost.mean()) * (strength / 2) * rows / REFERENCE_ROWS
    taken, none = torch.zeros(n, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    if budget == 0:
        return BlockSelection(taken, none, 0, 0, 0, 0.0, 0.0)
    candidates = rows * n - int(EXCLUDED * rows * n)
    _, sizes = torch.unique_consecutive(cost[order], return_counts=True)
    ends = sizes.cumsum(0)  # of the columns of one cost
    fits = min(int((total <= budget).sum()), candidates // rows)
    index = int((ends <= fits).sum())
    whole = int(ends[index - 1]) if index else 0
    taken[order[:whole]] = True
    loss = float(total[whole - 1]) if whole else 0.0
    if whole == n:
        return BlockSelection(taken, none, 0, 0, rows * n, budget, loss)
    boundary = order[whole : int(ends[index])]
    partial = loss + torch.cumsum(boundary_loss(boundary).cpu().reshape(-1), 0)
    kept = min(int((partial <= budget).sum()), candidates - whole * rows)
    kept -= 0 if part_rows else kept % len(boundary)
    head, extra = divmod(kept, len(boundary))
    loss = float(partial[kept - 1]) if kept else loss
    return BlockSelection(taken, boundary, head, extra, whole * rows + kept, budget, loss)


def select_rows(
    delta: torch.Tensor, change: torch.Tensor, cost: torch.Tensor, strength: float
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Select within each row of one block (`selection="row"`): every row has the block's budget divided by its rows.

    Columns go in the same order as in `select_block`; the int(0.15 * n) costliest are never kept. Strength 0 keeps
    none.

    Args:
        delta, change: D and X of the block, O x n fp32.
        cost: n values 1 / U_jj^2, fp64, CPU.
        strength: s >= 0.

    Returns:
        The mask (O x n booleans), the budget and the loss (0-d fp64), both over all rows; the tensors are on the device
        of `delta`.
    """
    rows, n = delta.shape
    budget = float(cost.mean()) * (strength / 2) / REFERENCE_ROWS
    mask = torch.zeros(rows, n, dtype=torch.bool, device=delta.device)
    loss = torch.zeros((), dtype=torch.float64, device=delta.device)
    if budget == 0:
        return mask, 0.0, loss
    cheapest = torch.argsort(cost, stable=True)[: n - int(EXCLUDED * n)]
    order, price = upload(cheapest, delta.device), upload(cost[cheapest], delta.device)
    step = _row_tile(delta.device)
    for lo in range(0, rows, step):
        tile = slice(lo, lo + step)
        losses = (delta[tile] - change[tile])[:, order].double().square_().mul_(price)
        kept = losses.cumsum(1) <= budget
        loss += losses.masked_fill_(~kept, 0).sum(1).sum()  # by rows first: the same bits on any number of threads
        mask[tile].index_copy_(1, order, kept)
    return mask, budget * rows, loss


def _row_tile(device: torch.device) -> int:
    return ROW_TILE if device.type == "cpu" else DEVICE_ROW_TILE


@triton.jit
def _column_squares_kernel(
    delta_ptr,  # (rows, n) fp32
    change_ptr,  # (rows, n) fp32
    sums_ptr,  # (slabs, n) fp64, out
    rows,
    n,
    stride_delta,
    stride_change,
    SLAB: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (column tiles, slabs); one program sums the squares of SLAB rows of BLOCK_C columns, in fp64."""
    col = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    first = tl.program_id(1) * SLAB
    acc = tl.zeros((BLOCK_C,), dtype=tl.float64)
    for begin in range(first, first + SLAB, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = (row < rows)[:, None] & (col < n)[None, :]
        delta = tl.load(delta_ptr + row[:, None] * stride_delta + col[None, :], mask=inside, other=0.0)
        change = tl.load(change_ptr + row[:, None] * stride_change + col[None, :], mask=inside, other=0.0)
        left = (delta - change).to(tl.float64)
        acc += tl.sum(left * left, axis=0)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * n + col, acc, mask=col < n)


def _column_squares_triton(delta: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    rows, n = delta.shape
    slabs = blocks(rows, _SLAB)
    sums = torch.empty(slabs, n, dtype=torch.float64, device=delta.device)
    grid = (blocks(n, _LAUNCH["BLOCK_C"]), slabs)
    launch(_column_squares_kernel, grid, delta, change, sums, rows, n, delta.stride(0), change.stride(0), **_LAUNCH)
    return sums.sum(0)


def _column_squares_torch(delta: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(delta.shape[1], dtype=torch.float64, device=delta.device)
    step = _row_tile(delta.device)
    for tile, written in zip(torch.split(delta, step), torch.split(change, step), strict=True):
        sums += (tile - written).double().square_().sum(0)
    return sums


def column_squares(delta: torch.Tensor, change: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Sum over the rows of (delta - change)^2: the losses of a block's columns before their price.

    Args:
        delta, change: rows x n fp32, with contiguous rows. Differences are taken in fp32.

    Returns:
        n sums, fp64, in an order of additions that depends on the shape alone.

    Example:
        delta [[1, 2], [3, 4]] with change [[0, 0], [1, 0]] gives [5, 20].
    """
    if resolve(backend, delta, change) == "triton":
        return _column_squares_triton(delta, change)
    return _column_squares_torch(delta, change)
