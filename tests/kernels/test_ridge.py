"""Ridge against the dense formula in fp64, and against what defines it: the least of an objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.calibrated.factor import NonFiniteGramError, NotPositiveDefiniteError, safety_factor
from safeshard.kernels.calibrated.leak import lora_rows
from safeshard.kernels.calibrated.ridge import ANCHOR_DAMPING, energies, ridge, spectra

PENALTIES = (0.0, 0.01, 0.3, 1.0, 30.0)
EPS = torch.finfo(torch.float32).eps


def make_gram(seed: int, n: int, size: int, device: str = "cpu", outliers: int = 0) -> Tensor:
    """X^T X of n correlated inputs, some of them `outliers` times as large; dead inputs among them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=draw) + 0.5 * torch.randn(n, 1, generator=draw)
    x[:, :: max(1, size // 3)] *= max(1, outliers)
    x[:, 5:6] = 0
    return (x.T @ x / n).to(device)


def make_delta(seed: int, rows: int, size: int, device: str = "cpu") -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed + 1)).to(device)


def anchor(size: int, keep: Tensor | None, device: str = "cpu") -> Tensor:
    """P by the definition, in fp64."""
    eye = torch.eye(size, dtype=torch.float64, device=device)
    return eye if keep is None else keep.double() / keep.double().diagonal().mean() + ANCHOR_DAMPING * eye


def dense(delta: Tensor, gram: Tensor, penalty: float, keep: Tensor | None = None) -> Tensor:
    """X by the definition, in fp64, with an explicit inverse."""
    h, p = gram.double(), anchor(len(gram), keep, str(gram.device))
    mean = h.diagonal().mean()
    c = penalty / mean if mean > 0 else 0.0
    return delta.double() @ p @ torch.linalg.inv(p + c * h)


def objective(x: Tensor, delta: Tensor, gram: Tensor, penalty: float, p: Tensor) -> float:
    away = x - delta.double()
    c = penalty / gram.double().diagonal().mean()
    return float(((away @ p) * away).sum() + c * ((x @ gram.double()) * x).sum())


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def test_docstring_example(device: str) -> None:
    solver = ridge(torch.tensor([[3.0, 0], [0, 1]], device=device), 2)
    torch.testing.assert_close(solver.apply(torch.ones(1, 2, device=device)).cpu(), torch.tensor([[0.25, 0.5]]))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16), n=st.integers(1, 150), size=st.integers(1, 130), rows=st.integers(1, 40),
    penalty=st.sampled_from(PENALTIES), outliers=st.sampled_from([0, 30]),
)  # fmt: skip
def test_is_the_dense_formula(
    device: str, seed: int, n: int, size: int, rows: int, penalty: float, outliers: int
) -> None:
    gram, delta = make_gram(seed, n, size, device, outliers), make_delta(seed, rows, size, device)
    before = gram.clone()
    condition = 1 + penalty * size  # the largest eigenvalue is at most the sum of the diagonal
    assert relative(ridge(gram, penalty).apply(delta), dense(delta, gram, penalty)) < 1e-6 + EPS * condition
    assert torch.equal(gram, before)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 150), size=st.integers(2, 120), penalty=st.sampled_from(PENALTIES))
def test_with_task_inputs_is_the_dense_formula(device: str, seed: int, n: int, size: int, penalty: float) -> None:
    gram, delta = make_gram(seed, 90, size, device), make_delta(seed, 7, size, device)
    task, keep = make_gram(seed + 7, n, size, device), 100 * make_gram(seed + 8, 3, size, device)
    solver = ridge(gram, penalty, task + keep)
    assert relative(solver.apply(delta), dense(delta, gram, penalty, task + keep)) < 1e-5


def test_above_a_leaf_of_the_cholesky_and_a_tile_of_rows(device: str) -> None:
    gram, delta = make_gram(3, 400, 600, device, 30), make_delta(3, 1100, 600, device)
    assert relative(ridge(gram, 0.3).apply(delta), dense(delta, gram, 0.3)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lora_is_the_dense_path(device: str, dtype: torch.dtype) -> None:
    gram = make_gram(4, 200, 96, device, 30)
    a, b = make_delta(4, 5, 96, device).to(dtype).float(), make_delta(5, 77, 5, device).to(dtype).float()
    for penalty in PENALTIES[1:]:
        solver = ridge(gram, penalty)
        assert relative(b @ solver.apply(a), solver.apply(b @ a).double()) < 1e-5


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_nearby_is_lower(weighted: bool) -> None:
    gram, delta = make_gram(6, 60, 40), make_delta(6, 9, 40)
    keep = make_gram(7, 25, 40) if weighted else None
    p = anchor(40, keep)
    x = ridge(gram, 0.5, keep).apply(delta).double()
    least = objective(x, delta, gram, 0.5, p)
    draw = torch.Generator().manual_seed(8)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            step = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            assert objective(x + size * step, delta, gram, 0.5, p) > least
    assert least < min(objective(delta.double(), delta, gram, 0.5, p), objective(0 * x, delta, gram, 0.5, p))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_greater_penalty_lets_less_through_and_goes_further_from_the_delta(weighted: bool) -> None:
    gram, delta = make_gram(9, 60, 48, outliers=30), make_delta(9, 9, 48)
    keep = make_gram(10, 25, 48) if weighted else None
    found = [ridge(gram, penalty, keep).apply(delta).double() for penalty in (0, 0.003, 0.03, 0.3, 3, 30, 300)]
    leaks = [float(((x @ gram.double()) * x).sum()) for x in found]
    p = anchor(48, keep)
    away = [float((((x - delta) @ p) * (x - delta)).sum()) for x in found]
    assert leaks == sorted(leaks, reverse=True)
    assert away == sorted(away)


def test_limits() -> None:
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))  # 12 safe inputs leave 18 directions free
    gram, delta = x.T @ x, make_delta(2, 6, 30)
    assert torch.equal(ridge(gram, 0).apply(delta), delta)
    free = torch.eye(30, dtype=torch.float64) - torch.linalg.pinv(x.double()) @ x.double()
    least = torch.linalg.eigvalsh(gram.double())[18] / gram.double().diagonal().mean()
    for penalty in (10, 1e2, 1e3):  # towards the null-space projection
        away = ridge(gram, penalty).apply(delta).double() - delta.double() @ free
        assert away.norm() < delta.norm() * (1 / (1 + penalty * least) + EPS * penalty * 30)
    assert torch.equal(ridge(torch.zeros(30, 30), 5).apply(delta), delta)  # nothing is excited


def test_is_safe_deltas_factor_at_another_damping() -> None:
    """(H + mu / lambda I)^-1 = U^T U with percdamp = 1 / lambda, so that X = (mu / lambda) D U^T U."""
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(4))
    gram, delta = x.T @ x, make_delta(4, 8, 50)
    u = safety_factor(gram, 1 / 0.3).u.double()
    expected = gram.double().diagonal().mean() / 0.3 * delta.double() @ u.T @ u
    assert relative(ridge(gram, 0.3).apply(delta), expected) < 1e-5


def test_rows_do_not_mix() -> None:
    gram, delta = make_gram(11, 90, 65), make_delta(11, 32, 65)
    solver = ridge(gram, 0.3)
    alone = torch.cat([solver.apply(part) for part in torch.split(delta, 16)])
    torch.testing.assert_close(solver.apply(delta), alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_spectrum_tells_the_energy_at_any_penalty(weighted: bool, rank: int) -> None:
    gram, a, b = make_gram(12, 200, 96, outliers=30), make_delta(12, rank, 96), make_delta(13, 33, rank)
    keep = make_gram(14, 60, 96) if weighted else None
    penalties = torch.tensor([0, 0.001, 0.03, 0.3, 1.0], dtype=torch.float64)
    got = energies(spectra([lora_rows(a, b)], gram, keep)[0], penalties)
    for penalty, energy in zip(penalties.tolist(), got.tolist(), strict=True):
        x = dense(b @ a, gram, penalty, keep)
        assert energy == pytest.approx(float(((x @ gram.double()) * x).sum()), rel=1e-3)


def test_wrong_inputs_are_refused() -> None:
    gram = make_gram(15, 20, 6)
    with pytest.raises(ValueError, match="square fp32"):
        ridge(gram[:, :5], 1)
    with pytest.raises(ValueError, match="square fp32"):
        ridge(gram.double(), 1)
    with pytest.raises(ValueError, match="keep must be"):
        ridge(gram, 1, gram[:5, :5])
    for penalty in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="penalty"):
            ridge(gram, penalty)
    for place in ((2, 2), (1, 3)):
        broken = gram.clone()
        broken[place] = torch.nan
        with pytest.raises(NonFiniteGramError):
            ridge(broken, 1)
    with pytest.raises(NotPositiveDefiniteError, match="penalty 1"):
        ridge(torch.tensor([[1.0, 5], [5, 1]]), 1)
