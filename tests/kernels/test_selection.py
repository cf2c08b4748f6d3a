"""Selections against the published formulation: a sort of all entries, whose losses are added up to a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.safedelta.selection import ROW_TILE, BlockSelection, column_squares, select_block, select_rows

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
STRENGTHS = st.sampled_from([0.0, 1.0, 300.0, 2048.0, 8192.0, 10000.0, 1e12])


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Random integers as fp64: every sum of them is exact, in any order."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def published(loss: Tensor, cost: Tensor, strength: float) -> Tensor:
    """A stable argsort of the rows x columns entries by cost, as they lie in memory; take while the sum allows."""
    rows, n = loss.shape
    budget = cost.sum().item() / n * (strength / 2) * rows / 4096
    order = np.argsort(cost.expand(rows, n).reshape(-1).numpy(), kind="stable")
    entries = [divmod(int(flat), n) for flat in order[: rows * n - int(0.15 * rows * n)]]
    mask, spent = torch.zeros(rows, n, dtype=torch.bool), 0.0
    for i, j in entries:
        spent += loss[i, j].item()
        if spent > budget or strength == 0:
            break
        mask[i, j] = True
    return mask


def published_rows(loss: Tensor, cost: Tensor, strength: float) -> Tensor:
    """The same within each row, on its share of the budget and the 85 % cheapest columns."""
    rows, n = loss.shape
    budget = cost.sum().item() / n * (strength / 2) / 4096
    columns = sorted(range(n), key=lambda j: cost[j].item())[: n - int(0.15 * n)]
    mask = torch.zeros(rows, n, dtype=torch.bool)
    for i in range(rows):
        spent = 0.0
        for j in columns:
            spent += loss[i, j].item()
            if spent > budget or strength == 0:
                break
            mask[i, j] = True
    return mask


def select(loss: Tensor, cost: Tensor, strength: float) -> tuple[BlockSelection, list[int]]:
    """`select_block` on a table of losses, and the columns it asked for."""
    asked: list[int] = []

    def boundary_loss(columns: Tensor) -> Tensor:
        asked.extend(columns.tolist())
        return loss[:, columns]

    return select_block(cost, loss.sum(0), boundary_loss, len(loss), strength), asked


def check_block(selection: BlockSelection, loss: Tensor, cost: Tensor, strength: float) -> None:
    rows = len(loss)
    expected = published(loss, cost, strength)
    assert torch.equal(selection.mask(rows), expected)
    assert torch.equal(torch.stack([selection.columns(i) for i in range(rows)]), expected)
    assert selection.entries == expected.sum()
    assert selection.loss == loss[expected].sum()
    assert selection.loss <= selection.budget
    assert selection.budget == pytest.approx(cost.mean().item() * strength / 2 * rows / 4096, rel=1e-14)


def test_block_docstring_example() -> None:
    loss = torch.tensor([[1.0, 4, 1], [2, 5, 3]], dtype=torch.float64)
    selection, asked = select(loss, torch.tensor([1.0, 4, 2], dtype=torch.float64), 8192)
    assert selection.taken.tolist() == [True, False, False]
    assert (selection.boundary.tolist(), selection.head, selection.extra, selection.entries) == ([2], 1, 0, 3)
    assert selection.budget == pytest.approx(14 / 3, rel=1e-15)
    assert selection.loss == 4
    assert asked == [2]
    assert selection.mask(2).tolist() == [[True, False, True], [True, False, False]]


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**16), shape=SHAPES, strength=STRENGTHS, prices=st.sampled_from([2, 5, 1000]))
def test_block_is_the_published_selection(seed: int, shape: tuple[int, int], strength: float, prices: int) -> None:
    """Few prices make many ties; losses of zero are among the entries."""
    loss, cost = integers(seed, 0, 4, *shape), integers(seed + 1, 1, prices, shape[1])
    selection, asked = select(loss, cost, strength)
    check_block(selection, loss, cost, strength)
    assert len(asked) <= (cost[:, None] == cost).sum(1).max()  # of one price, once


def test_columns_of_one_price_are_kept_row_by_row() -> None:
    loss, cost = torch.ones(4, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    selection, _ = select(loss, cost, 14336)
    check_block(selection, loss, cost, 14336)
    assert selection.budget == 7
    assert selection.entries == 7
    assert (selection.head, selection.extra) == (1, 1)
    assert selection.mask(4).sum(0).tolist() == [2, 1, 1, 1, 1, 1]


def test_whole_columns_go_before_those_at_the_boundary() -> None:
    """The cheapest column is kept whole; of two dear ones of one price a row and the first half of the next."""
    loss, cost = torch.ones(3, 3, dtype=torch.float64), torch.tensor([4.0, 1, 4], dtype=torch.float64)
    strength = 6 * 2 * 4096 / (3 * 3)  # a budget of 6 entries
    selection, asked = select(loss, cost, strength)
    check_block(selection, loss, cost, strength)
    assert selection.mask(3).tolist() == [[True, True, True], [True, True, False], [False, True, False]]
    assert asked == [0, 2]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (6, 1), (1, 6)])
def test_all_entries_are_taken_where_the_excluded_share_rounds_to_none(shape: tuple[int, int]) -> None:
    selection, asked = select(integers(1, 1, 9, *shape), integers(2, 1, 9, shape[1]), 1e12)
    assert selection.mask(shape[0]).all()
    assert selection.entries == shape[0] * shape[1]
    assert not asked


@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (96, 31), (37, 101)])
def test_huge_strength_takes_85_percent(shape: tuple[int, int]) -> None:
    rows, n = shape
    selection, _ = select(integers(1, 0, 9, *shape), integers(2, 1, 9, n), 1e12)
    assert selection.entries == selection.mask(rows).sum() == rows * n - int(0.15 * rows * n)


def test_zero_strength_takes_nothing_even_where_it_costs_nothing() -> None:
    loss, cost = torch.zeros(5, 4, dtype=torch.float64), integers(1, 1, 9, 4)
    selection, asked = select(loss, cost, 0)
    assert not selection.mask(5).any()
    assert (selection.entries, selection.head, selection.budget, selection.loss) == (0, 0, 0, 0)
    assert not asked
    mask, budget, spent = select_rows(torch.zeros(5, 4), torch.zeros(5, 4), cost, 0)
    assert not mask.any()
    assert (budget, spent) == (0, 0)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), shape=SHAPES, strength=STRENGTHS, prices=st.sampled_from([2, 5, 1000]))
def test_rows_each_spend_their_own_budget(
    device: str, seed: int, shape: tuple[int, int], strength: float, prices: int
) -> None:
    delta, change = integers(seed, -2, 3, *shape), integers(seed + 1, -1, 2, *shape)
    cost = integers(seed + 2, 1, prices, shape[1])
    loss = (delta - change) ** 2 * cost
    mask, budget, spent = select_rows(delta.float().to(device), change.float().to(device), cost, strength)
    expected = published_rows(loss, cost, strength)
    assert torch.equal(mask.cpu(), expected)
    assert spent == loss[expected].sum()
    assert budget == pytest.approx(cost.mean().item() * strength / 2 * shape[0] / 4096, rel=1e-14)


def test_rows_over_several_tiles(device: str) -> None:
    rows = 2 * ROW_TILE + 5
    delta, cost = integers(3, -3, 4, rows, 20), integers(4, 1, 9, 20)
    mask, _, _ = select_rows(delta.float().to(device), torch.zeros(rows, 20, device=device), cost, 30000)
    assert torch.equal(mask.cpu(), published_rows(delta**2 * cost, cost, 30000))
    full, _, _ = select_rows(delta.float().to(device), torch.zeros(rows, 20, device=device), cost, 1e12)
    assert (full.sum(1) == 17).all()


def test_column_squares_docstring_example(backend: Backend, device: str) -> None:
    delta, change = torch.tensor([[1.0, 2], [3, 4]], device=device), torch.tensor([[0.0, 0], [1, 0]], device=device)
    sums = column_squares(delta, change, backend=backend)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [5, 20]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 150), n=st.integers(1, 130))
def test_column_squares_match_fp64(backend: Backend, device: str, seed: int, rows: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, rows, n + 3, generator=generator)
    delta, change = wide[0, :, 1 : n + 1], wide[1, :, 2 : n + 2]
    exact = (delta - change).double().square().sum(0)
    sums = column_squares(delta.to(device), change.to(device), backend=backend).cpu()
    torch.testing.assert_close(sums, exact, rtol=1e-14, atol=0)


def test_column_squares_over_several_slabs(backend: Backend, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(1100, 3, generator=generator)
    sums = column_squares(delta.to(device), torch.zeros(1100, 3, device=device), backend=backend).cpu()
    torch.testing.assert_close(sums, delta.double().square().sum(0), rtol=1e-14, atol=0)
