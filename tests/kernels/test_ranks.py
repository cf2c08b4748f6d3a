"""Concatenated and truncated sums against dense products and singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.kernels.ranks import DENSE_COLUMNS, concatenate, truncate, truncate_dense

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 60))
WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4)
ONE = torch.ones(2, 3)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, rows: int, cols: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(seed, rank, cols), draw(seed + 1000, rows, rank)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16), shape=SHAPES, ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data()
)
def test_concatenate_is_the_weighted_sum_of_deltas(
    seed: int, shape: tuple[int, int], ranks: list[int], data: st.DataObject
) -> None:
    adapters = [adapter(seed + i, *shape, rank) for i, rank in enumerate(ranks)]
    weights = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=len(ranks), max_size=len(ranks)))
    a, b = concatenate(adapters, weights)
    assert a.dtype == b.dtype == torch.float32
    assert a.shape == (sum(ranks), shape[1])
    terms = [w * (y.double() @ x.double()) for (x, y), w in zip(adapters, weights, strict=True)]
    scale = sum(term.norm() for term in terms)
    assert (b.double() @ a.double() - sum(terms)).norm() <= 1e-6 * scale


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), shape=SHAPES, inner=st.integers(1, 20), rank=st.integers(1, 25))
def test_truncate_is_the_best_approximation(seed: int, shape: tuple[int, int], inner: int, rank: int) -> None:
    a, b = adapter(seed, *shape, inner)
    delta = b.double() @ a.double()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    new_a, new_b, lost = truncate(a, b, rank)
    assert new_a.dtype == new_b.dtype == torch.float32
    assert (new_a.shape, new_b.shape) == ((rank, shape[1]), (shape[0], rank))
    # The best approximation itself turns where singular values meet; its error does not.
    error, best_error = (delta - new_b.double() @ new_a.double()).norm(), (delta - best).norm()
    assert error <= best_error + 1e-6 * delta.norm()
    assert lost.item() == pytest.approx((best_error / delta.norm()).item(), abs=1e-7)


def test_truncate_splits_the_singular_values_and_fixes_the_signs() -> None:
    a, b = adapter(6, 30, 20, 8)
    new_a, new_b, _ = truncate(a, b, 5)
    singular_values = torch.linalg.svdvals(b.double() @ a.double())[:5].float()
    for gram in (new_a @ new_a.T, new_b.T @ new_b):
        torch.testing.assert_close(gram, singular_values.diag(), rtol=1e-5, atol=1e-4)
    assert (new_b.gather(0, new_b.abs().argmax(0, keepdim=True)) > 0).all()
    negated = truncate(-a, -b, 5)
    assert torch.equal(negated[0], new_a)
    assert torch.equal(negated[1], new_b)


def test_truncate_pads_with_zeros() -> None:
    a, b = adapter(7, 6, 5, 9)
    new_a, new_b, lost = truncate(a, b, 8)
    assert (new_a[5:] == 0).all()
    assert (new_b[:, 5:] == 0).all()
    assert lost.item() == 0
    torch.testing.assert_close(new_b @ new_a, b @ a)


def test_truncate_of_a_zero_delta_loses_nothing() -> None:
    a, b, lost = truncate(torch.ones(3, 7), torch.zeros(5, 3), 2)
    assert (b @ a == 0).all()
    assert lost.item() == 0
    low_rank, lost = truncate_dense(torch.zeros(5, 7), 2)
    assert (low_rank == 0).all()
    assert lost.item() == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), shape=SHAPES, rank=st.integers(1, 45))
def test_truncate_dense_is_the_best_approximation(seed: int, shape: tuple[int, int], rank: int) -> None:
    delta = draw(seed, *shape)
    low_rank, lost = truncate_dense(delta, rank)
    cut = torch.linalg.svdvals(delta.double())[rank:].norm()
    assert low_rank.dtype == torch.float32
    assert torch.linalg.matrix_rank(low_rank.double(), rtol=1e-5) <= rank
    assert (delta.double() - low_rank.double()).norm() <= cut + 1e-6 * delta.norm()
    assert lost.item() == pytest.approx((cut / delta.double().norm()).item(), abs=1e-7)


@pytest.mark.parametrize("shape", [(20, 2 * DENSE_COLUMNS + 3), (DENSE_COLUMNS + 3, 20)])
def test_truncate_dense_over_several_strips(shape: tuple[int, int]) -> None:
    a, b = adapter(8, *shape, 6)
    low_rank, lost = truncate_dense((b @ a).bfloat16(), 6)
    torch.testing.assert_close(low_rank, b @ a, atol=0.05, rtol=0.01)
    cut = torch.linalg.svdvals((b @ a).bfloat16().double())[6:].norm() / (b @ a).bfloat16().double().norm()
    assert lost.item() == pytest.approx(cut.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: concatenate([], []), "must match, got 0 and 0"),
        (lambda: concatenate([(ONE, ONE)], [1.0]), "do not fit"),
        (lambda: concatenate([(ONE, ONE.T), (ONE.T, ONE)], [1.0, 1.0]), "do not fit"),
        (lambda: truncate(ONE, ONE, 1), "A must be r x I"),
        (lambda: truncate(ONE, ONE.T, 0), "rank must be at least 1"),
        (lambda: truncate_dense(torch.ones(3), 1), "must be 2-D"),
        (lambda: truncate_dense(ONE, 0), "rank at least 1"),
    ],
)
def test_bad_requests_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
