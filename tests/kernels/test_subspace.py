"""The safety subspace against the dense formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ridge import make_gram
from torch import Tensor

from safeshard.kernels.calibrated.factor import NonFiniteGramError
from safeshard.kernels.calibrated.subspace import add, directions, inside, subspace


def randn(seed: int, *shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def dense(weight: Tensor, gram: Tensor, share: float) -> tuple[Tensor, int, float]:
    """U U^T of the whole O x O matrix, how many directions it has, and the gap behind them; fp64."""
    values, vectors = torch.linalg.eigh(weight.double() @ gram.double() @ weight.double().T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    p = (values / values.sum()).tolist()
    entropies = [-each * math.log(each) if each > 0 else 0.0 for each in p]
    held, count = 0.0, 0
    while held < share * math.fsum(entropies) * (1 - 1e-12):
        held, count = held + entropies[count], count + 1
    count = max(count, 1)
    gap = float((values[count - 1] - (values[count] if count < len(values) else 0)) / values[0])
    return vectors[:, :count] @ vectors[:, :count].T, count, gap


def test_docstring_example() -> None:
    weight, gram = torch.tensor([[2.0, 0], [0, 1]]), torch.eye(2)
    assert [subspace(weight, gram, share).asked for share in (0.3, 0.5, 1.0)] == [1, 2, 2]
    assert subspace(weight, gram, 0.3).u.abs().tolist() == [[1], [0]]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16), rows=st.integers(1, 50), columns=st.integers(1, 50), n=st.integers(1, 80),
    share=st.sampled_from([0.1, 0.5, 0.8, 1.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    outliers=st.sampled_from([0, 30]),
)  # fmt: skip
def test_is_the_dense_formula(
    device: str, seed: int, rows: int, columns: int, n: int, share: float, dtype: torch.dtype, outliers: int
) -> None:
    weight, gram = randn(seed, rows, columns, device=device).to(dtype), make_gram(seed, n, columns, device, outliers)
    u, asked = subspace(weight, gram, share)
    projection, count, gap = dense(weight, gram, share)
    assert u.dtype == torch.float32
    if share < 1 and gap > 1e-8:  # else the last directions are of rounding, or not told apart
        assert asked == count == u.shape[1]
        assert (u.double() @ u.double().T - projection).norm() < 1e-5 + 1e-13 / gap
    assert (u.double().T @ u.double() - torch.eye(u.shape[1], device=device)).norm() < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(300, 40), (40, 300), (513, 64)])
def test_what_is_added(device: str, rows: int, columns: int) -> None:
    """More rows than a tile; few directions, many of them cut off by `most`."""
    aligned, unaligned, tuned = (randn(i, rows, columns, device=device).to(torch.bfloat16) for i in range(3))
    u, asked = subspace(aligned, make_gram(7, 90, columns, device), 0.9, most=5)
    assert asked > 5
    assert u.shape == (rows, 5)
    c = inside(u, aligned, unaligned)
    vector = aligned.double() - unaligned.double()
    torch.testing.assert_close(c.double(), u.double().T @ vector, rtol=1e-5, atol=1e-5)
    got = torch.cat(list(add(tuned, u, 0.5 * c, torch.float32)))
    expected = tuned.double() + 0.5 * u.double() @ u.double().T @ vector
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_energies_without_entropy() -> None:
    assert directions(torch.zeros(3, dtype=torch.float64), 0.8) == 0
    assert directions(torch.tensor([5.0, 0, -1e-18], dtype=torch.float64), 0.8) == 1  # one direction: no entropy
    assert directions(torch.ones(10, dtype=torch.float64), 0.8) == 8
    assert directions(torch.ones(10, dtype=torch.float64), 1.0) == 10
    assert subspace(randn(0, 6, 4), torch.zeros(4, 4), 0.8).u.shape == (6, 0)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="O x I"):
        subspace(randn(0, 4, 3), torch.eye(4), 0.5)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share"):
            subspace(randn(0, 4, 3), torch.eye(3), share)
    broken = torch.eye(3)
    broken[1, 1] = math.nan
    with pytest.raises(NonFiniteGramError):
        subspace(randn(0, 4, 3), broken, 0.5)
