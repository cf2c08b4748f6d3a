"""Compensation against OBS entry by entry, as SparseGPT (arXiv 2301.00774) writes it, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.calibrated.factor import Factor, safety_factor
from safeshard.kernels.safedelta.column_compensation import compensate_columns
from safeshard.kernels.safedelta.compensation import (
    LoraCompensated,
    Selection,
    groups_to_adapter,
    safe_delta_dense,
    safe_delta_lora,
    selection_mask,
)
from safeshard.kernels.safedelta.row_compensation import compensate_rows
from safeshard.kernels.safedelta.selection import BlockSelection

TOLERANCE = 5e-6  # of the norm of what is written, as for the published cases
LORA = 1e-6  # of the norm of |B| |M|: where the terms of B M cancel, an M in fp32 cannot hold more
BUDGET = 1e-5  # how much of a budget the rounding of fp32 losses may be worth

SEEDS = st.integers(0, 2**16)
ROWS = st.integers(1, 24)
COLUMNS = st.one_of(st.integers(1, 40), st.integers(120, 200))  # on-chip chunks hold 128
BLOCK_SIZES = st.sampled_from([1, 7, 16, 33, 64, 150, 2048])
SUB_BLOCKS = st.sampled_from([1, 4])
STRENGTHS = st.sampled_from([0.0, 1.0, 500.0, 5000.0, 20000.0, 1e12])
DEAD = st.lists(st.integers(0, 199), max_size=5)


def obs_block(x: np.ndarray, d: np.ndarray, u: np.ndarray, kept: np.ndarray, start: int, sub_block: int) -> None:
    """Set the kept entries of one block of x to d, one at a time; each moves what is to its right in its row.

    With H^-1 = U^T U, freezing entry j at d_j changes the later ones by -(x_j - d_j) / U_jj * U_j,: (SparseGPT, eq. 3,
    on the Cholesky factor). As published, an entry does not move those of its own sub-block, counted within the block.
    """
    for i, j in np.argwhere(kept):
        free = start + min((j // sub_block + 1) * sub_block, kept.shape[1])
        error = (x[i, start + j] - d[i, start + j]) / u[start + j, start + j]
        x[i, start + j] = d[i, start + j]
        x[i, free:] -= error * u[start + j, free:]


def check_prefix(kept: np.ndarray, losses: np.ndarray, budget: float, candidates: int, short: int = 0) -> None:
    """`kept` (in the order of cost) is the longest prefix whose losses fit the budget and that the candidates allow."""
    count = int(kept.sum())
    assert kept[:count].all()
    assert count <= candidates
    spent = np.cumsum(losses)
    assert count >= min((spent <= budget * (1 - BUDGET)).sum(), candidates) - short
    assert count <= (spent <= budget * (1 + BUDGET)).sum()


def check_selection(
    kept: np.ndarray, losses: np.ndarray, cost: np.ndarray, strength: float, selection: str, short: int
) -> None:
    rows, n = kept.shape
    if strength == 0:
        assert not kept.any()
        return
    order = np.argsort(cost, kind="stable")
    budget = cost.mean() * strength / 2 / 4096
    if selection == "row":
        for i in range(rows):
            check_prefix(kept[i, order], losses[i, order], budget, n - int(0.15 * n))
    else:  # all entries by cost, stable as they lie in memory
        entries = np.argsort(np.broadcast_to(cost, kept.shape).ravel(), kind="stable")
        check_prefix(
            kept.ravel()[entries], losses.ravel()[entries], budget * rows, rows * n - int(0.15 * rows * n), short
        )


def safe_delta_by_entries(
    d: Tensor, u: Tensor, mask: Tensor, strength: float, block_size: int, sub_block: int, selection: str,
    short: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Safe Delta in fp64, entry by entry, checking on its way that `mask` is what the losses and the budget select.

    `short`: how many entries each block may lack of them.
    """
    delta, factor, kept = d.cpu().double().numpy(), u.cpu().double().numpy(), mask.cpu().numpy()
    x = np.zeros_like(delta)
    cost = 1 / factor.diagonal() ** 2
    for block, start in enumerate(range(0, delta.shape[1], block_size)):
        own = slice(start, start + block_size)
        lack = short[block] if short else 0
        check_selection(kept[:, own], (delta - x)[:, own] ** 2 * cost[own], cost[own], strength, selection, lack)
        obs_block(x, delta, factor, kept[:, own], start, sub_block)
    return torch.from_numpy(x)


def draw(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def calibration(seed: int, size: int, dead: list[int]) -> Tensor:
    """Correlated inputs, some of them dead, fewer tokens than inputs for some sizes."""
    x, mix = draw(seed, (100, size), (size, size))
    x @= torch.eye(size) + mix / math.sqrt(size)
    x[:, [d % size for d in dead]] = 0
    return x


def make_factor(seed: int, size: int, dead: list[int], device: str) -> Factor:
    x = calibration(seed, size, dead)
    return safety_factor((x.T @ x).to(device))


def close(result: Tensor, exact: Tensor) -> bool:
    return bool((result.cpu().double() - exact).norm() <= TOLERANCE * exact.norm())


def lora_delta(result: LoraCompensated, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([b[start:stop].to(dtype) @ m.to(dtype) for start, stop, m in result.groups])


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, rows=ROWS, cols=COLUMNS, block_size=BLOCK_SIZES, sub_block=SUB_BLOCKS, strength=STRENGTHS, dead=DEAD)
@pytest.mark.parametrize("selection", ["block", "row"])
def test_dense_is_obs_entry_by_entry(
    device: str, selection: Selection, seed: int, rows: int, cols: int, block_size: int, sub_block: int,
    strength: float, dead: list[int],
) -> None:  # fmt: skip
    (delta,), factor = draw(seed, (rows, cols)), make_factor(seed + 1, cols, dead, device)
    options: dict[str, Any] = {"selection": selection, "block_size": block_size, "sub_block": sub_block}
    result = safe_delta_dense(delta.to(device), factor, strength, backend="torch", **options)
    exact = safe_delta_by_entries(delta, factor.u, result.mask, strength, block_size, sub_block, selection)
    assert result.delta.dtype == torch.float32
    assert close(result.delta, exact)
    assert torch.equal(result.delta.cpu()[result.mask.cpu()], delta[result.mask.cpu()])
    assert result.scores.selected_fraction == result.mask.sum().item() / result.mask.numel()
    assert result.scores.loss <= result.scores.budget


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, rows=ROWS, cols=st.integers(1, 150), sub_block=SUB_BLOCKS, strength=STRENGTHS, dead=DEAD)
@pytest.mark.parametrize("selection", ["block", "row"])
def test_dense_on_triton_is_obs_entry_by_entry(
    device: str, selection: Selection, seed: int, rows: int, cols: int, sub_block: int, strength: float, dead: list[int]
) -> None:
    (delta,), factor = draw(seed, (rows, cols)), make_factor(seed + 1, cols, dead, device)
    options: dict[str, Any] = {"selection": selection, "block_size": 97, "sub_block": sub_block}
    result = safe_delta_dense(delta.to(device), factor, strength, backend="triton", **options)
    exact = safe_delta_by_entries(delta, factor.u, result.mask, strength, 97, sub_block, selection)
    assert close(result.delta, exact)
    assert torch.equal(result.delta.cpu()[result.mask.cpu()], delta[result.mask.cpu()])


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS, rows=ROWS, cols=COLUMNS, rank=st.integers(1, 9), block_size=BLOCK_SIZES, sub_block=SUB_BLOCKS,
    strength=STRENGTHS, dead=DEAD,
)  # fmt: skip
def test_lora_is_obs_entry_by_entry(
    device: str, seed: int, rows: int, cols: int, rank: int, block_size: int, sub_block: int, strength: float,
    dead: list[int],
) -> None:  # fmt: skip
    (a, b), factor = draw(seed, (rank, cols), (rows, rank)), make_factor(seed + 1, cols, dead, device)
    result = safe_delta_lora(
        a.to(device), b.to(device), factor, strength, block_size=block_size, sub_block=sub_block
    )  # fmt: skip
    mask = selection_mask(result.selections, rows)
    short = [max(len(s.boundary) - 1, 0) for s in result.selections]  # of columns of one price whole rows are kept
    exact = safe_delta_by_entries(
        b.double() @ a.double(), factor.u, mask, strength, block_size, sub_block, "block", short
    )
    b = b.to(device)
    reach = torch.cat([b[start:stop].abs() @ m.abs() for start, stop, m in result.groups]).norm()
    assert (lora_delta(result, b).cpu() - exact).norm() <= LORA * reach
    assert [(start, stop) for start, stop, _ in result.groups] == list(pairwise(edges(result)))
    assert len(result.groups) <= 1 + len(result.selections)
    for start, stop, m in result.groups:
        assert (mask[start:stop] == mask[start]).all()
        assert torch.equal(m.cpu()[:, mask[start]], a[:, mask[start]])
    assert result.scores.selected_fraction == mask.sum().item() / mask.numel()
    new_a, new_b = groups_to_adapter(result.groups, b)
    assert (len(new_a), new_b.shape) == (rank * len(result.groups), (rows, len(new_a)))
    torch.testing.assert_close(new_b.double() @ new_a.double(), lora_delta(result, b), rtol=1e-12, atol=1e-12)


def edges(result: LoraCompensated) -> list[int]:
    return [start for start, _, _ in result.groups] + [result.groups[-1].stop]


def test_lora_is_dense_on_its_product(device: str) -> None:
    (a, b), factor = draw(5, (6, 300), (90, 6)), make_factor(6, 300, [17, 160], device)
    a, b = a.to(device), b.to(device)
    dense = safe_delta_dense(b @ a, factor, 9000.0, block_size=128)
    lora = safe_delta_lora(a, b, factor, 9000.0, block_size=128)
    assert torch.equal(selection_mask(lora.selections, 90), dense.mask.cpu())
    assert len(lora.groups) == 4
    assert close(lora_delta(lora, b), dense.delta.cpu().double())
    assert lora.scores.selected_fraction == dense.scores.selected_fraction
    assert lora.scores.budget == dense.scores.budget
    assert lora.scores.loss == pytest.approx(dense.scores.loss, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS, rows=ROWS, cols=COLUMNS, later=st.integers(0, 20), sub_block=st.sampled_from([1, 3, 4, 50, 128]),
    share=st.sampled_from([0.0, 0.2, 0.8, 1.0]), data=st.data(),
)  # fmt: skip
def test_columns_of_any_selection(
    device: str, seed: int, rows: int, cols: int, later: int, sub_block: int, share: float, data: st.DataObject
) -> None:
    """Any columns, any boundary, any rows and part of a row of it, from any X, after an earlier block."""
    start, stop = 5, 5 + cols
    change, delta = draw(seed, (rows, stop + later), (rows, stop + later))
    factor = make_factor(seed + 1, stop + later, [], device)
    taken = torch.rand(cols, generator=torch.Generator().manual_seed(seed + 2)) < share
    boundary = torch.tensor(sorted(data.draw(st.sets(st.integers(0, cols - 1), min_size=1, max_size=5))))
    head = data.draw(st.integers(0, rows))
    extra = data.draw(st.integers(0, len(boundary) - 1)) if head < rows else 0
    taken[boundary] = False
    selection = BlockSelection(taken, boundary, head, extra, 0, 0.0, 0.0)
    exact = change.double().numpy().copy()
    obs_block(exact, delta.double().numpy(), factor.u.cpu().double().numpy(), selection.mask(rows).numpy(), start,
              sub_block)  # fmt: skip
    written, target = change.to(device), delta[:, start:stop].to(device)
    compensate_columns(written, target, factor.u, start, selection, head, int(extra > 0), sub_block)
    assert close(written, torch.from_numpy(exact))
    assert torch.equal(written[:, :start].cpu(), change[:, :start])
    mask = selection.mask(rows)
    assert torch.equal(written[:, start:stop].cpu()[mask], delta[:, start:stop][mask])


@settings(deadline=None, max_examples=10)
@given(
    seed=SEEDS, rows=ROWS, cols=COLUMNS, later=st.integers(0, 20), sub_block=st.sampled_from([1, 3, 4, 50, 128]),
    share=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
)  # fmt: skip
def test_rows_of_any_selection(
    backend: Backend, device: str, seed: int, rows: int, cols: int, later: int, sub_block: int, share: float
) -> None:
    start, stop = 5, 5 + cols
    change, delta = draw(seed, (rows, stop + later), (rows, stop + later))
    factor = make_factor(seed + 1, stop + later, [], device)
    kept = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed + 2)) < share
    exact = change.double().numpy().copy()
    obs_block(exact, delta.double().numpy(), factor.u.cpu().double().numpy(), kept.numpy(), start, sub_block)
    written = change.to(device)
    compensate_rows(written, delta.to(device), kept.to(device), factor.u, start, sub_block, backend=backend)
    assert close(written, torch.from_numpy(exact))
    assert torch.equal(written[:, :start].cpu(), change[:, :start])
    assert torch.equal(written[:, start:stop].cpu()[kept], delta[:, start:stop][kept])


def test_row_docstring_example(backend: Backend, device: str) -> None:
    change = torch.zeros(1, 2, device=device)
    delta, kept = torch.tensor([[2.0, 5]], device=device), torch.tensor([[True, False]], device=device)
    u = torch.tensor([[2.0, 0.5], [0, 1]], device=device)
    compensate_rows(change, delta, kept, u, 0, 1, backend=backend)
    assert change.tolist() == [[2, 0.5]]


def test_block_on_the_row_example(device: str) -> None:
    change, u = torch.zeros(1, 2, device=device), torch.tensor([[2.0, 0.5], [0, 1]], device=device)
    none = torch.zeros(0, dtype=torch.int64)
    selection = BlockSelection(torch.tensor([True, False]), none, 0, 0, 1, 0.0, 0.0)
    compensate_columns(change, torch.tensor([[2.0, 5]], device=device), u, 0, selection, 0, 0, 1)
    assert change.tolist() == [[2, 0.5]]


@pytest.mark.parametrize("selection", ["block", "row"])
@pytest.mark.parametrize("compensate", [True, False])
def test_strength_zero_changes_nothing(backend: Backend, device: str, selection: Selection, compensate: bool) -> None:
    (a, b), factor = draw(7, (3, 50), (20, 3)), make_factor(8, 50, [4], device)
    a, b = a.to(device), b.to(device)
    b[3] = 0  # entries that would cost nothing
    options: dict[str, Any] = {"block_size": 16, "compensate": compensate}
    dense = safe_delta_dense(b @ a, factor, 0, selection=selection, backend=backend, **options)
    assert not dense.delta.view(torch.int32).any()
    assert not dense.mask.any()
    lora = safe_delta_lora(a, b, factor, 0, **options)
    ((start, stop, m),) = lora.groups
    assert (start, stop) == (0, 20)
    assert (m == 0).all()
    for scores in (dense.scores, lora.scores):
        assert (scores.selected_fraction, scores.budget, scores.loss) == (0, 0, 0)


@pytest.mark.parametrize(("cols", "block_size"), [(150, 64), (5, 2048), (21, 7), (130, 130)])
def test_huge_strength_keeps_all_but_15_percent_of_each_block(device: str, cols: int, block_size: int) -> None:
    rows, rank = 23, 4
    (a, b), factor = draw(9, (rank, cols), (rows, rank)), make_factor(10, cols, [1], device)
    a, b = a.to(device), b.to(device)
    shared = safe_delta_dense(b @ a, factor, 1e12, block_size=block_size).mask.cpu()
    apart = safe_delta_dense(b @ a, factor, 1e12, block_size=block_size, selection="row").mask.cpu()
    lora = selection_mask(safe_delta_lora(a, b, factor, 1e12, block_size=block_size).selections, rows)
    for start in range(0, cols, block_size):
        own = slice(start, start + block_size)
        entries, width = shared[:, own].numel(), shared[:, own].shape[1]
        assert shared[:, own].sum() == lora[:, own].sum() == entries - int(0.15 * entries)
        assert (apart[:, own].sum(1) == width - int(0.15 * width)).all()


@pytest.mark.parametrize("selection", ["block", "row"])
def test_without_compensation_the_same_entries_are_kept_and_the_rest_is_zero(
    backend: Backend, device: str, selection: Selection
) -> None:
    (delta,), factor = draw(11, (30, 70)), make_factor(12, 70, [], device)
    delta = delta.to(device)
    options: dict[str, Any] = {"selection": selection, "block_size": 32, "backend": backend}
    full = safe_delta_dense(delta, factor, 8000, **options)
    plain = safe_delta_dense(delta, factor, 8000, compensate=False, **options)
    assert 0 < full.scores.selected_fraction < 0.85
    assert torch.equal(plain.mask, full.mask)
    assert torch.equal(plain.delta, torch.where(full.mask, delta, 0))
    assert plain.scores == full.scores


def test_without_compensation_on_lora(device: str) -> None:
    (a, b), factor = draw(13, (4, 70), (30, 4)), make_factor(14, 70, [], device)
    a, b = a.to(device), b.to(device)
    full, plain = (safe_delta_lora(a, b, factor, 8000, block_size=32, compensate=c) for c in (True, False))
    mask = selection_mask(full.selections, 30)
    assert 0 < full.scores.selected_fraction < 0.85
    assert torch.equal(selection_mask(plain.selections, 30), mask)
    assert plain.scores == full.scores
    expected = torch.where(mask, b.cpu().double() @ a.cpu().double(), 0)
    torch.testing.assert_close(lora_delta(plain, b).cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("selection", ["block", "row", "lora"])
@pytest.mark.parametrize("sub_block", [1, 4])
@pytest.mark.parametrize("strength", [500, 5000, 20000, 1e12])
def test_compensation_lowers_the_output_error(device: str, selection: Any, sub_block: int, strength: float) -> None:
    """|X change|_F on the calibration inputs, against reverting the same entries without compensation."""
    (a, b), x = draw(15, (5, 140), (60, 5)), calibration(16, 140, [9]).to(device)
    a, b, factor = a.to(device), b.to(device), safety_factor(x.T @ x)
    changes = []
    for compensate in (True, False):
        options: dict[str, Any] = {"block_size": 64, "sub_block": sub_block, "compensate": compensate}
        if selection == "lora":
            changes.append(lora_delta(safe_delta_lora(a, b, factor, strength, **options), b))
        else:
            changes.append(safe_delta_dense(b @ a, factor, strength, selection=selection, **options).delta.double())
    with_it, without = ((x.double() @ change.T).norm() for change in changes)
    assert with_it < without


def test_exact_obs_is_the_constrained_optimum(device: str) -> None:
    """One kept column before all others: its compensation minimises the damped output error over all that follow."""
    x = calibration(17, 30, []).double()
    gram = x.T @ x
    factor = safety_factor(gram.float().to(device))
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(30)
    (delta,) = draw(18, (8, 30))
    change = torch.zeros(8, 30, device=device)
    selection = BlockSelection(torch.arange(30) == 0, torch.zeros(0, dtype=torch.int64), 0, 0, 8, 0.0, 0.0)
    compensate_columns(change, delta.to(device), factor.u, 0, selection, 0, 0, 1)
    best = -delta[:, :1].double() @ torch.linalg.solve(h[1:, 1:], h[1:, :1]).T
    assert close(change[:, 1:], best)


def test_inputs_are_not_changed(device: str) -> None:
    (a, b), factor = draw(19, (4, 50), (30, 4)), make_factor(20, 50, [], device)
    tensors = [a.to(device), b.to(device), (b @ a).to(device), factor.u]
    before = [t.clone() for t in tensors]
    safe_delta_lora(tensors[0], tensors[1], factor, 8000, block_size=16)
    for selection in ("block", "row"):
        safe_delta_dense(tensors[2], factor, 8000, selection=selection, block_size=16)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


FACTOR = Factor(torch.eye(3), 0.01, (0.01,))
DELTA, A, B = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: safe_delta_dense(DELTA.double(), FACTOR, 1), "fp32 with contiguous rows"),
        (lambda: safe_delta_dense(torch.zeros(3, 2).T, FACTOR, 1), "contiguous rows"),
        (lambda: safe_delta_dense(torch.zeros(3), FACTOR, 1), "must be O x I"),
        (lambda: safe_delta_dense(torch.zeros(2, 4), FACTOR, 1), r"must be 4 x 4, got \(3, 3\)"),
        (lambda: safe_delta_dense(DELTA, FACTOR, -1), "strength must be at least 0, got -1"),
        (lambda: safe_delta_dense(DELTA, FACTOR, float("nan")), "strength"),
        (lambda: safe_delta_dense(DELTA, FACTOR, 1, block_size=0), "block_size must be at least 1"),
        (lambda: safe_delta_dense(DELTA, FACTOR, 1, sub_block=0), r"sub_block must be 1 \.\.\. 128, got 0"),
        (lambda: safe_delta_dense(DELTA, FACTOR, 1, sub_block=129), "got 129"),
        (lambda: safe_delta_dense(DELTA, FACTOR, 1, selection="rows"), "must be 'block' or 'row', got 'rows'"),  # type: ignore[arg-type]
        (lambda: safe_delta_lora(A, B.T, FACTOR, 1), "A must be r x I and B O x r"),
        (lambda: safe_delta_lora(A.bfloat16(), B, FACTOR, 1), "torch.bfloat16"),
        (lambda: safe_delta_lora(torch.zeros(1, 4), B, FACTOR, 1), "must be 4 x 4"),
        (lambda: safe_delta_lora(A, B, FACTOR, -1), "strength"),
    ],
)
def test_bad_requests_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
