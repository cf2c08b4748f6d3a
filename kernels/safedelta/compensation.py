"""Safe Delta on one weight: keep selected entries of the fine-tuned delta, and compensate the rest.

Source: Safe Delta (ICML 2025). In delta space D is the fine-tuned delta and X the delta written, zero at first. Blocks
of columns are handled in order: select entries by their loss (`selection`), set them to D, and move
the later entries of their rows so that the layer's output on the calibration inputs changes least
(`column_compensation` where rows share their columns, `row_compensation` where they do not).

Shapes: D and X are O x I; U is I x I; for LoRA D = B A with A r x I and B O x r; a block has n columns. All fp32,
losses and budgets fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from safeshard.kernels.backend import Backend, upload
from safeshard.kernels.calibrated.factor import Factor
from safeshard.kernels.safedelta.column_compensation import compensate_columns
from safeshard.kernels.safedelta.row_compensation import CHUNK, compensate_rows
from safeshard.kernels.safedelta.selection import BlockSelection, column_squares, select_block, select_rows

Selection = Literal["block", "row"]


@dataclass(frozen=True)
class Scores:
    """What was kept of a weight, over all its blocks.

    Attributes:
        selected_fraction: entries kept, of all entries.
        budget: the loss allowed.
        loss: the loss of the entries kept.
    """

    selected_fraction: float
    budget: float
    loss: float


@dataclass(frozen=True)
class Compensated:
    """The delta written for one weight.

    Attributes:
        delta: O x I fp32, on the device of the input.
        mask: O x I booleans, same device: entries where `delta` is the fine-tuned delta exactly, and where a writer
            should copy the fine-tuned weight bit for bit.
        scores: for the manifest.
    """

    delta: torch.Tensor
    mask: torch.Tensor
    scores: Scores


class LoraGroup(NamedTuple):
    """Rows start ... stop of the delta written are B[start:stop] @ m, with m r x I fp32."""

    start: int
    stop: int
    m: torch.Tensor


@dataclass(frozen=True)
class LoraCompensated:
    """The delta written for one weight, as groups of rows that cover 0 ... O in order.

    Attributes:
        groups: at most one more than there are blocks.
        selections: one a block; `selection_mask` turns them into a mask of entries.
        scores: for the manifest.
    """

    groups: list[LoraGroup]
    selections: list[BlockSelection]
    scores: Scores


def _check(width: int, factor: Factor, strength: float, block_size: int, sub_block: int) -> None:
    if factor.u.shape != (width, width):
        raise ValueError(f"the factor must be {width} x {width}, got {tuple(factor.u.shape)}")
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if not 1 <= sub_block <= CHUNK:
        raise ValueError(f"sub_block must be 1 ... {CHUNK}, got {sub_block}")


def _scores(selections: list[BlockSelection], size: int) -> Scores:
    return Scores(
        sum(s.entries for s in selections) / size, sum(s.budget for s in selections), sum(s.loss for s in selections)
    )


def selection_mask(selections: list[BlockSelection], rows: int, device: torch.device | None = None) -> torch.Tensor:
    """The entries that consecutive blocks keep: rows x I booleans, on `device` (the CPU by default)."""
    mask = upload(torch.cat([s.taken for s in selections]), device or torch.device("cpu")).repeat(rows, 1)
    for block, own in zip(selections, mask.split([len(s.taken) for s in selections], dim=1), strict=True):
        boundary = upload(block.boundary, own.device)
        own[: block.head].index_fill_(1, boundary, True)
        own[block.head : block.head + 1].index_fill_(1, boundary[: block.extra], True)
    return mask


def _dense_block(
    delta: torch.Tensor, factor: Factor, strength: float, block_size: int, sub_block: int, backend: Backend
) -> Compensated:
    rows, width = delta.shape
    change, selections = torch.zeros_like(delta), []
    for start in range(0, width, block_size):
        own = slice(start, start + block_size)
        cost, target, written = factor.cost[own], delta[:, own], change[:, own]
        loss = column_squares(target, written, backend=backend).cpu() * cost

        def boundary_loss(
            columns: torch.Tensor,
            cost: torch.Tensor = cost,
            target: torch.Tensor = target,
            written: torch.Tensor = written,
        ) -> torch.Tensor:
            own = upload(columns, target.device)
            left = target.index_select(1, own) - written.index_select(1, own)
            return left.double().square_() * cost[columns[0]].item()

        selection = select_block(cost, loss, boundary_loss, rows, strength)
        middle = int(selection.extra > 0)
        compensate_columns(change, target, factor.u, start, selection, selection.head, middle, sub_block)
        selections.append(selection)
    mask = selection_mask(selections, rows, delta.device)
    return Compensated(change, mask, _scores(selections, delta.numel()))


def _dense_row(
    delta: torch.Tensor, factor: Factor, strength: float, block_size: int, sub_block: int, backend: Backend
) -> Compensated:
    change, masks, budget = torch.zeros_like(delta), [], 0.0
    loss = torch.zeros((), dtype=torch.float64, device=delta.device)
    for start in range(0, delta.shape[1], block_size):
        own = slice(start, start + block_size)
        kept, block_budget, block_loss = select_rows(delta[:, own], change[:, own], factor.cost[own], strength)
        compensate_rows(change, delta, kept, factor.u, start, sub_block, backend=backend)
        masks.append(kept)
        budget, loss = budget + block_budget, loss + block_loss
    mask = torch.cat(masks, 1)
    kept, spent = torch.stack([mask.count_nonzero().double(), loss]).tolist()  # one wait
    return Compensated(change, mask, Scores(kept / mask.numel(), budget, spent))


def safe_delta_dense(
    delta: torch.Tensor,
    factor: Factor,
    strength: float,
    *,
    selection: Selection = "block",
    block_size: int = 2048,
    sub_block: int = 4,
    compensate: bool = True,
    backend: Backend = "auto",
) -> Compensated:
    """Safe Delta on a full fine-tuned delta.

    Args:
        delta: D = W_finetuned - W_aligned, O x I fp32 with contiguous rows. Unchanged.
        factor: of the Gram of this weight's inputs, on the same device.
        strength: s >= 0; 0 writes no change at all, a huge one keeps all but int(0.15 n) entries of each block.
        selection: "block", the published one, shares a budget among the rows; "row" gives each row its own.
        block_size: columns that are selected together.
        sub_block: 1 ... 128 columns that do not compensate each other; 1 is exact OBS.
        compensate: False reverts what is not kept, for ablation; the entries kept are the same.
        backend: see `safeshard.kernels.backend.resolve`.

    Memory: the result (fp32 and booleans), and per block U's rows of the kept columns and their errors (O x n fp32).

    Raises:
        ValueError: options or shapes other than these.
    """
    if delta.ndim != 2 or delta.dtype != torch.float32 or delta.stride(1) != 1:
        raise ValueError(f"delta must be O x I fp32 with contiguous rows, got {tuple(delta.shape)} {delta.dtype}")
    _check(delta.shape[1], factor, strength, block_size, sub_block)
    if selection not in ("block", "row"):
        raise ValueError(f"selection must be 'block' or 'row', got {selection!r}")
    run = _dense_block if selection == "block" else _dense_row
    result = run(delta, factor, strength, block_size, sub_block, backend)
    if compensate:
        return result
    return Compensated(delta.masked_fill(~result.mask, 0), result.mask, result.scores)


def _split(groups: list[LoraGroup], head: int) -> list[LoraGroup]:
    """Cut the group that `head` falls into, so that each group lies wholly before it or after it."""
    cut = []
    for lo, hi, m in groups:
        edges = [lo, head, hi] if lo < head < hi else [lo, hi]
        cut += [LoraGroup(p, q, m) for p, q in pairwise(edges)]
    return cut


def _select_lora(
    groups: list[LoraGroup], a: torch.Tensor, b: torch.Tensor, cost: torch.Tensor, start: int, strength: float
) -> BlockSelection:
    """One block's selection from m_j^T (B^T B) m_j, in fp64: losses by row are formed for the boundary column alone."""
    own = slice(start, start + len(cost))
    lefts = [(a[:, own] - m[:, own]).double() for _, _, m in groups]
    parts = [b[lo:hi].double() for lo, hi, _ in groups]
    squares = sum(((part.T @ part @ left) * left).sum(0).clamp_min_(0) for part, left in zip(parts, lefts, strict=True))
    assert isinstance(squares, torch.Tensor)

    def boundary_loss(columns: torch.Tensor) -> torch.Tensor:
        own = upload(columns, a.device)
        losses = torch.cat([part @ left.index_select(1, own) for part, left in zip(parts, lefts, strict=True)])
        return losses.square_() * cost[columns[0]].item()

    return select_block(cost, squares.cpu() * cost, boundary_loss, len(b), strength, part_rows=False)


def safe_delta_lora(
    a: torch.Tensor,
    b: torch.Tensor,
    factor: Factor,
    strength: float,
    *,
    block_size: int = 2048,
    sub_block: int = 4,
    compensate: bool = True,
) -> LoraCompensated:
    """Safe Delta (`selection="block"`) on a LoRA delta, wholly in its r-dimensional space.

    Neither W nor the O x I delta is formed. A boundary splits one group of rows in two, so the result is a LoRA adapter
    again, of rank r times the number of groups (see `groups_to_adapter`). Of columns of one price at the boundary whole
    rows alone are kept: a part of one row would take a rank of its own. With `selection="row"` rows have masks of their
    own and the result has no low rank: form B A and call `safe_delta_dense`.

    Args:
        a: A, r x I fp32.
        b: B with the adapter's scaling folded in, O x r fp32.
        factor, strength, block_size, sub_block, compensate: as for `safe_delta_dense`.

    Memory: groups x r x I fp32, and per block U's rows of the kept columns.

    Raises:
        ValueError: options or shapes other than these.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or a.dtype != torch.float32 or b.dtype != torch.float32:
        raise ValueError(
            f"A must be r x I and B O x r, fp32, got {tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}"
        )
    rank, width = a.shape
    _check(width, factor, strength, block_size, sub_block)
    groups, selections = [LoraGroup(0, len(b), torch.zeros_like(a))], []
    for start in range(0, width, block_size):
        own = slice(start, start + block_size)
        selection = _select_lora(groups, a, b, factor.cost[own], start, strength)
        groups = _split(groups, selection.head)
        stacked = torch.cat([m for _, _, m in groups])
        leading = rank * sum(hi <= selection.head for _, hi, _ in groups)
        target = a[:, own].repeat(len(groups), 1)
        compensate_columns(stacked, target, factor.u, start, selection, leading, 0, sub_block)
        groups = [LoraGroup(lo, hi, m) for (lo, hi, _), m in zip(groups, torch.split(stacked, rank), strict=True)]
        selections.append(selection)
    if not compensate:
        kept = [upload(torch.cat([s.columns(lo) for s in selections]), a.device) for lo, _, _ in groups]
        groups = [LoraGroup(lo, hi, a * k) for (lo, hi, _), k in zip(groups, kept, strict=True)]
    return LoraCompensated(groups, selections, _scores(selections, len(b) * width))


def groups_to_adapter(groups: list[LoraGroup], b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapter equal to `groups`: A' stacks their matrices, B' has B's rows block by block on a diagonal.

    Args:
        groups: g groups over all rows of B, as `safe_delta_lora` returns them.
        b: the B given there, O x r; the product B' A' needs no further scaling.

    Returns:
        A' (g r x I fp32) and B' (O x g r fp32).
    """
    rank = b.shape[1]
    wide = b.new_zeros(len(b), rank * len(groups))
    for index, (lo, hi, _) in enumerate(groups):
        wide[lo:hi, index * rank : (index + 1) * rank] = b[lo:hi]
    return torch.cat([m for _, _, m in groups]), wide
