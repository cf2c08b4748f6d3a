"""Many deltas at many penalties of one Gram: the dense formula in fp64, and the bits that each has alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ridge import dense, make_delta, make_gram, relative
from torch import Tensor

from safeshard.kernels.calibrated import grams as module
from safeshard.kernels.calibrated import stacks
from safeshard.kernels.calibrated.grams import Grams, near, series
from safeshard.kernels.calibrated.leak import energy, lora_energy
from safeshard.kernels.calibrated.ridge import Ridge, ridge

SIZE = 480  # ten rows of A share a factor


def test_near_is_the_closest_by_ratio() -> None:
    assert [near(p) for p in (0.1, 0.3, 1, 3, 1e4, 1e-4)] == [0.1, 0.3, 1, 3, 1e4, 1e-4]
    assert [near(p) for p in (0.17, 0.18, 0.54, 0.56, 1.8, 9.9)] == [0.1, 0.3, 0.3, 1, 3, 10]


@given(penalty=st.floats(1e-6, 1e6), k=st.floats(0, 1))
def test_the_series_is_the_fraction_it_stands_for(penalty: float, k: float) -> None:
    a = penalty / near(penalty)
    factors = series(a)
    t = 2 * k - 1
    found = sum(f * math.cos(j * math.acos(t)) for j, f in enumerate(factors))
    assert found == pytest.approx(1 / (a + (1 - a) * k), rel=3.1e-8)
    assert len(factors) <= 10
    assert series(1.0) == [1.0]


@settings(deadline=None, max_examples=20)
@example(seed=201, rank=1, penalty=1.0, outliers=30, n=1)  # A's row next to misses the one input
@given(
    seed=st.integers(0, 2**16), rank=st.integers(1, 10), penalty=st.floats(0.001, 30),
    outliers=st.sampled_from([0, 30]), n=st.integers(1, 600),
)  # fmt: skip
def test_shrink_is_the_dense_formula(device: str, seed: int, rank: int, penalty: float, outliers: int, n: int) -> None:
    """As near to fp64 as a factor of its own, at any penalty; so are the energies."""
    gram, a = make_gram(seed, n, SIZE, device, outliers), make_delta(seed, rank, SIZE, device)
    found = Grams(gram).shrink(penalty, a)
    exact = dense(a, gram, penalty)
    condition = 1 + penalty * SIZE
    assert relative(found.rows, exact) < 1e-6 + torch.finfo(torch.float32).eps * condition
    before = a.double() @ gram.double() @ a.double().T
    rounding = torch.finfo(torch.float32).eps * a.norm() ** 2 * gram.norm()  # what is seen where A next to misses all
    assert (found.before - before).norm() <= 1e-5 * before.norm() + rounding
    written = found.rows.double()
    rounding = 1e-6 * written.norm() ** 2 * gram.norm()  # where next to nothing is left, it is what is seen
    assert (found.left - written @ gram.double() @ written.T).norm() <= rounding


def test_shrink_with_kept_inputs_and_with_nothing_excited(device: str) -> None:
    safe, keep = (make_gram(seed, 90, SIZE, device) for seed in (1, 2))
    a = make_delta(3, 2, SIZE, device)
    assert relative(Grams(safe, keep).shrink(0.5, a).rows, dense(a, safe, 0.5, keep)) < 1e-5
    assert torch.equal(Grams(torch.zeros_like(safe)).shrink(0.5, a).rows, a)


def _asked(size: int, device: str) -> list[tuple[float, Tensor]]:
    """Adapters of several ranks and dtypes; some at several penalties, of one factor and of others."""
    dtypes = (torch.float32, torch.bfloat16)
    adapters = [make_delta(i, rank, size, device).to(dtypes[i % 2]) for i, rank in enumerate((1, 2, 3, 8, 10, 5))]
    penalties = (0.02, 0.1, 0.12, 0.17, 0.3, 0.9)
    return [(p, a) for p in penalties for i, a in enumerate(adapters) if (i + int(100 * p)) % 3]


@pytest.mark.parametrize("stack", [16, 48, 512])
@pytest.mark.parametrize("kept", [False, True])
def test_what_was_expected_has_the_bits_that_it_has_alone(
    device: str, monkeypatch: pytest.MonkeyPatch, stack: int, kept: bool
) -> None:
    for where in (module, stacks):
        monkeypatch.setattr(where, "STACK", stack)
    gram = make_gram(5, 300, SIZE, device, 30)
    keep = make_gram(6, 300, SIZE, device) if kept else None
    asked = _asked(SIZE, device)
    alone = [Grams(gram, keep).shrink(p, a) for p, a in asked]
    made: list[float] = []

    def counted(safe: Tensor, penalty: float, keep: Tensor | None) -> Ridge:
        made.append(penalty)
        return ridge(safe, penalty, keep)

    monkeypatch.setattr(module, "ridge", counted)
    for order in (asked, asked[::-1]):
        shared = Grams(gram, keep)
        for penalty, a in order:
            shared.expect(penalty, a)
        made.clear()
        got = {(p, id(a)): shared.shrink(p, a) for p, a in order}
        assert len(made) == (6 if kept else 4)  # 0.03, 0.1, 0.3 and 1
        for (p, a), mine in zip(asked, alone, strict=True):
            for one, other in zip(got[p, id(a)], mine, strict=True):
                assert torch.equal(one, other)
        shared.forget()
        assert torch.equal(shared.shrink(*asked[0]).rows, alone[0].rows)


@pytest.mark.parametrize("kept", [False, True])
def test_expected_energies_are_those_of_each_alone(device: str, kept: bool) -> None:
    gram = make_gram(5, 300, SIZE, device, 30)
    keep = make_gram(6, 300, SIZE, device) if kept else None
    deltas = [make_delta(i, rank, SIZE, device) for i, rank in enumerate((1, 2, 16, 40, 7))]
    owners: list[Any] = [object() for _ in deltas]
    penalties = (0.0, 0.01, 0.3, 2.0)
    alone = [Grams(gram, keep).energies(o, y, penalties) for o, y in zip(owners, deltas, strict=True)]
    shared = Grams(gram, keep)
    for owner, rows in zip(owners, deltas, strict=True):
        shared.expect_energies(owner, rows)
    assert [shared.energies(o, y, penalties) for o, y in zip(owners, deltas, strict=True)] == alone
    for found, rows in zip(alone, deltas, strict=True):
        assert found[0] == pytest.approx(energy(rows, gram), rel=1e-5)
        assert found == sorted(found, reverse=True)


def test_a_library_whose_bits_depend_on_the_stack_is_found_out() -> None:
    """Then each goes by itself, from the first on."""
    calls: list[int] = []

    def apply(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows * (1 + len(rows) * 1e-3)

    matrices = [make_delta(i, 3, 20) for i in range(4)]
    for _ in range(2):
        found = stacks.stacked(matrices, apply, "made up")
        assert all(torch.equal(got, rows * 1.016) for got, rows in zip(found, matrices, strict=True))
    assert calls == [64, 16, *[16] * 4, *[16] * 4]


def test_the_energy_of_a_pair_from_its_inner_products() -> None:
    assert lora_energy(torch.tensor([[2.0], [1.0]]), torch.tensor([[3.0]], dtype=torch.float64)) == 15
    gram, a, b = make_gram(1, 90, 40), make_delta(2, 3, 40), make_delta(3, 17, 3)
    x = b.double() @ a.double()
    inner = a.double() @ gram.double() @ a.double().T
    assert lora_energy(b, inner) == pytest.approx(float(((x @ gram.double()) * x).sum()), rel=1e-9)
