"""Energies of deltas against traces in fp64, and the quadrature against eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.calibrated.factor import Factor, safety_factor
from safeshard.kernels.calibrated.leak import (
    PROBES,
    Quadrature,
    dense_rows,
    energy,
    energy_by_factor,
    lora_rows,
    quadratures,
)


def alone(rows: Tensor, apply: Callable[[Tensor], Tensor]) -> Quadrature:
    [found] = quadratures([rows], lambda many: [apply(each) for each in many])
    return found


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(delta: torch.Tensor, gram: torch.Tensor) -> float:
    return float(torch.trace(delta.double() @ gram.double() @ delta.double().T))


def test_docstring_example() -> None:
    assert energy(torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 1], [1, 1]])) == 11


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16), rank=st.integers(1, 12), rows=st.integers(1, 60), size=st.integers(1, 70),
    empty=st.booleans(),
)  # fmt: skip
def test_rows_of_a_pair_stand_for_its_product(seed: int, rank: int, rows: int, size: int, empty: bool) -> None:
    a, b, x = randn(seed, rank, size), randn(seed + 1, rows, rank), randn(seed + 2, 80, size)
    if empty:
        b[:, rank // 2 :] = 0  # as a pair that was never trained
    gram = x.T @ x
    assert energy(lora_rows(a, b), gram) == pytest.approx(exact(b @ a, gram), rel=1e-5, abs=1e-9)


def test_a_pair_has_no_more_rows_than_its_delta() -> None:
    """Whatever its rank: an eigendecomposition of the rank takes minutes where that is some thousands."""
    a, b, x = randn(0, 300, 40), randn(1, 20, 300), randn(2, 90, 40)
    rows = lora_rows(a, b)
    assert len(rows) == 20
    assert energy(rows, x.T @ x) == pytest.approx(exact(b @ a, x.T @ x), rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16), size=st.integers(2, 70), percdamp=st.sampled_from([0.003, 0.01, 0.3]),
    n=st.integers(1, 90),
)  # fmt: skip
def test_the_factor_tells_the_energy_as_well(seed: int, size: int, percdamp: float, n: int) -> None:
    x, rows = randn(seed, n, size), randn(seed + 1, 9, size)
    x[:, size // 2] = 0  # dead: its diagonal becomes 1, which is not energy
    gram = x.T @ x
    factor = safety_factor(gram, percdamp)
    assert factor.added is not None
    damped = exact(rows, gram.double() + torch.diag(factor.added))
    assert energy_by_factor(rows, factor) == pytest.approx(exact(rows, gram), abs=2e-5 * damped)


def test_a_factor_that_does_not_say_what_was_added_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say"):
        energy_by_factor(randn(0, 2, 3), Factor(torch.eye(3), 0.01, (0.01,)))


def test_a_full_delta_of_few_rows_stands_for_itself() -> None:
    delta = randn(3, 2 * PROBES, 11)
    assert dense_rows(delta, 5) is delta


def test_mixtures_are_right_on_average_and_depend_on_the_seed_alone() -> None:
    x, delta = randn(4, 50, 40), randn(5, 700, 40)
    gram = x.T @ x
    estimates = torch.tensor([energy(dense_rows(delta, seed), gram) for seed in range(100)])
    assert dense_rows(delta, 1).shape == (PROBES, 40)
    assert torch.equal(dense_rows(delta, 1), dense_rows(delta, 1))
    whole = exact(delta, gram)
    assert abs(float(estimates.mean()) / whole - 1) < 3 * float(estimates.std()) / whole / 10
    assert float(estimates.std()) / whole < 0.1


@pytest.mark.parametrize("rows", [1, 16])
def test_quadrature_against_eigenvalues_over_eight_decades(rows: int) -> None:
    size = 500
    q = torch.linalg.qr(randn(6, size, size).double())[0]
    values = torch.logspace(-5, 3, size, dtype=torch.float64)
    matrix = (q * values @ q.T).float()
    y = randn(7, rows, size)
    found = alone(y, lambda v: v @ matrix)
    weights = (y.double() @ q).square().sum(0)
    assert float(found.weights.sum()) == pytest.approx(float(y.double().square().sum()), rel=1e-6)
    for c in (0.0, 0.001, 0.01, 0.1):
        expected = float((weights * values / (1 + c * values) ** 2).sum())
        assert float((found.weights * found.nodes / (1 + c * found.nodes) ** 2).sum()) == pytest.approx(
            expected, rel=1e-3
        )


def test_quadrature_where_there_is_nothing() -> None:
    assert alone(torch.zeros(2, 4), lambda v: v).weights.sum() == 0
    still = alone(randn(8, 2, 4), torch.zeros_like)
    assert still.nodes.tolist() == [0]


def test_quadrature_of_a_few_eigenvalues() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1, 2, 2, 5, 5]))
    found = alone(randn(9, 3, 6), lambda v: v @ matrix)
    assert float(found.weights.sum()) == pytest.approx(float(randn(9, 3, 6).double().square().sum()), rel=1e-6)
    heavy = found.nodes[found.weights > 1e-3]
    assert all(min(abs(node - value) for value in (1, 2, 5)) < 1e-5 for node in heavy.tolist())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="A must be r x I"):
        lora_rows(randn(0, 2, 5), randn(1, 4, 3))
