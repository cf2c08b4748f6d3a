"""The factor against the dense inverse in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.calibrated.factor import (
    LADDER,
    LEAF,
    NonFiniteGramError,
    NotPositiveDefiniteError,
    safety_factor,
)

EPS = torch.finfo(torch.float32).eps


def make_gram(seed: int, n: int, size: int, dead: list[int], device: str = "cpu") -> Tensor:
    """X^T X of n correlated inputs with dead ones among them; below the diagonal there is nothing to rely on."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=generator) + 0.5 * torch.randn(n, 1, generator=generator)
    x[:, [d % size for d in dead]] = 0
    gram = x.T @ x
    return torch.where(torch.ones_like(gram).triu() == 1, gram, torch.nan).to(device)


def damped(gram: Tensor, percdamp: float) -> Tensor:
    """H + damp by the definition, in fp64."""
    h = gram.double().triu()
    h = h + h.triu(1).T
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    return h + percdamp * diagonal.mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)


def assert_is_factor(u: Tensor, gram: Tensor, damping: float) -> None:
    """u is upper triangular and u^T u inverts the damped Gram as well as fp32 and its condition number allow."""
    assert u.dtype == torch.float32
    assert (u.tril(-1) == 0).all()
    assert (u.diagonal() > 0).all()
    h = damped(gram, damping)
    inverse = torch.linalg.inv(h)
    error = (u.double().T @ u.double() - inverse).norm() / inverse.norm()
    assert error <= 2 * EPS * torch.linalg.cond(h)


def test_docstring_example(device: str) -> None:
    factor = safety_factor(torch.tensor([[3.0, 0], [0, 1]], device=device), 0.5)
    expected = torch.tensor([[0.5, 0], [0, torch.tensor(0.5).sqrt()]], device=device)
    torch.testing.assert_close(factor.u, expected, rtol=EPS, atol=0)
    assert (factor.damping, factor.attempts) == (0.5, (0.5,))
    torch.testing.assert_close(factor.cost, torch.tensor([4.0, 2.0], dtype=torch.float64), rtol=4 * EPS, atol=0)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 200),
    size=st.integers(1, 120),
    dead=st.lists(st.integers(0, 119), max_size=5),
    percdamp=st.sampled_from([0.003, 0.01, 0.3]),
)
def test_inverts_the_damped_gram(device: str, seed: int, n: int, size: int, dead: list[int], percdamp: float) -> None:
    gram = make_gram(seed, n, size, dead, device)
    before = gram.clone()
    factor = safety_factor(gram, percdamp)
    assert_is_factor(factor.u, gram, percdamp)
    assert factor.damping == percdamp
    assert factor.attempts == (percdamp,)
    assert torch.equal(gram.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("size", [LEAF, LEAF + 1, 2 * LEAF + 89])
def test_over_several_leaves_and_panels(device: str, size: int) -> None:
    gram = make_gram(1, 700, size, [0, size - 1], device)
    assert_is_factor(safety_factor(gram).u, gram, 0.01)


def test_dead_inputs_stand_alone(device: str) -> None:
    """A dead input has 1 on the diagonal and no others to affect; all dead gives a multiple of the identity."""
    gram = make_gram(2, 90, 12, [0, 7, 11], device)
    factor = safety_factor(gram)
    diagonal = torch.where(gram.diagonal() == 0, 1, gram.diagonal()).double()
    for dead in (0, 7, 11):
        others = torch.arange(12, device=device) != dead
        assert (factor.u[dead, others] == 0).all()
        assert (factor.u[others, dead] == 0).all()
        assert factor.cost[dead].item() == pytest.approx(1 + 0.01 * diagonal.mean().item(), rel=1e-6)
    silent = safety_factor(torch.zeros(5, 5, device=device), 3.0)
    assert torch.equal(silent.u, 0.5 * torch.eye(5, device=device))


def test_cost_is_the_price_of_each_column(device: str) -> None:
    factor = safety_factor(make_gram(3, 40, 30, [], device))
    assert factor.cost.dtype == torch.float64
    assert factor.cost.device.type == "cpu"
    torch.testing.assert_close(factor.cost, 1 / factor.u.cpu().double().diagonal() ** 2, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("least", "attempts"), [(-1.0, 2), (-10.0, 3)])
def test_indefinite_gram_climbs_the_ladder(device: str, least: float, attempts: int) -> None:
    """The first two inputs have eigenvalues `least` and 100 - `least`; the rungs add 0.5, 5 and 50."""
    gram = torch.eye(50, device=device) * 50
    gram[0, 1] = 50 - least
    factor = safety_factor(gram)
    assert factor.attempts == tuple(0.01 * rung for rung in LADDER[:attempts])
    assert factor.damping == factor.attempts[-1]
    assert_is_factor(factor.u, gram, factor.damping)


def test_what_no_damping_mends_is_refused(device: str) -> None:
    gram = torch.eye(4, device=device)
    gram[0, 3] = 5
    before = gram.clone()
    with pytest.raises(NotPositiveDefiniteError, match=r"with damping 0\.01, 0\.1, 1$"):
        safety_factor(gram)
    assert torch.equal(gram, before)
    assert safety_factor(gram, ladder=(1.0, 500.0)).attempts == (0.01, 5.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(2, 2), (0, 3), (4, 5), (0, 5)])
def test_not_finite_gram_is_refused(device: str, place: tuple[int, int], value: float) -> None:
    gram = make_gram(4, 40, 6, [], device)
    gram[place] = value
    with pytest.raises(NonFiniteGramError, match="diagonal"):
        safety_factor(gram)


def test_column_major_gram_gives_the_same_factor(device: str) -> None:
    gram = make_gram(5, 40, 23, [3], device)
    factor = safety_factor(gram.T.contiguous().T)
    assert torch.equal(factor.u, safety_factor(gram).u)
    assert factor.u.is_contiguous()


@pytest.mark.parametrize(
    ("gram", "percdamp", "message"),
    [
        (torch.eye(3).double(), 0.01, "square fp32"),
        (torch.zeros(3, 4), 0.01, r"got \(3, 4\)"),
        (torch.zeros(3), 0.01, "square fp32"),
        (torch.eye(3), 0.0, "percdamp must be positive and finite, got 0"),
        (torch.eye(3), -1.0, "percdamp"),
        (torch.eye(3), float("nan"), "percdamp"),
        (torch.eye(3), float("inf"), "percdamp"),
    ],
)
def test_wrong_inputs_are_refused(gram: Tensor, percdamp: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        safety_factor(gram, percdamp)
