"""Merges against PEFT itself, against entry-by-entry sums, and against dense singular value decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import task_arithmetic
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.merge import COUNTERS, DENSE_COLUMNS, concatenate, dare_linear, linear, truncate, truncate_dense
from safeshard.kernels.philox import philox_words
from safeshard.kernels.projection import WEIGHT_DTYPES

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 60))
WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4)  # torch adds up to four in order
KEYS = st.integers(0, 2**64 - 1)


def draw(seed: int, count: int, shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


def adapter(seed: int, rows: int, cols: int, rank: int) -> tuple[Tensor, Tensor]:
    (a,), (b,) = draw(seed, 1, (rank, cols)), draw(seed + 1000, 1, (rows, rank))
    return a, b


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal to the bit: a negative zero is not a positive one."""
    return x.dtype == y.dtype == torch.float32 and torch.equal(x.cpu().view(torch.int32), y.cpu().view(torch.int32))


def test_docstring_example(backend: Backend, device: str) -> None:
    tensors = [torch.tensor([1.0, 2], device=device), torch.tensor([3.0, 4], device=device)]
    assert linear(tensors, [0.5, 2], backend=backend).tolist() == [6.5, 9]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), shape=SHAPES, weights=WEIGHTS, transposed=st.booleans())
def test_linear_is_pefts_to_the_bit(
    backend: Backend, device: str, seed: int, shape: tuple[int, int], weights: list[float], transposed: bool
) -> None:
    tensors = draw(seed, len(weights), shape, device)
    tensors[0][0, 0] = -0.0
    if transposed:
        tensors = [tensor.T for tensor in tensors]
    expected = task_arithmetic([tensor.cpu() for tensor in tensors], torch.tensor(weights))
    assert same_bits(linear(tensors, weights, backend=backend), expected)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_linear_takes_each_dtype_as_fp32(backend: Backend, device: str, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in draw(2, 2, (9, 7), device)]
    expected = task_arithmetic([tensor.cpu().float() for tensor in tensors], torch.tensor([0.8, 0.2]))
    assert same_bits(linear(tensors, [0.8, 0.2], backend=backend), expected)


def by_entries(tensors: list[Tensor], weights: list[float], density: float, keys: list[int]) -> Tensor:
    """`dare_linear` one entry at a time, in NumPy's fp32."""
    total = np.zeros(tensors[0].numel(), np.float32)
    for tensor, weight, key in zip(tensors, weights, keys, strict=True):
        for i, x in enumerate(tensor.float().flatten().cpu().numpy()):
            word = philox_words(key, i // 4, 1, torch.device("cpu"))[0, i % 4].item()
            if word < density * 2**32:
                total[i] += np.float32(weight) * (x / np.float32(density))
    return torch.from_numpy(total).view(tensors[0].shape)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    jobs=st.lists(st.tuples(st.floats(-2, 2, width=32), KEYS), min_size=1, max_size=3),
    density=st.integers(1, 2**16).map(lambda n: n / 2**16),
    transposed=st.booleans(),
)
def test_dare_linear_matches_entry_by_entry(
    backend: Backend,
    device: str,
    seed: int,
    shape: tuple[int, int],
    jobs: list[tuple[float, int]],
    density: float,
    transposed: bool,
) -> None:
    weights, keys = [weight for weight, _ in jobs], [key for _, key in jobs]
    tensors = draw(seed, len(jobs), shape, device)
    if transposed:
        tensors = [tensor.T for tensor in tensors]
    expected = by_entries(tensors, weights, density, keys)
    assert same_bits(dare_linear(tensors, weights, density, keys, backend=backend), expected)


def test_dare_linear_has_the_same_bits_in_both_backends_over_several_chunks(device: str) -> None:
    tensors = [tensor.bfloat16() for tensor in draw(3, 2, (4 * COUNTERS + 37,), device)]
    torch_result, triton_result = (
        dare_linear(tensors, [0.8, 0.2], 0.3, [7, 2**63 + 1], backend=backend) for backend in ("torch", "triton")
    )
    assert same_bits(torch_result, triton_result)


def test_an_entry_is_kept_whatever_is_merged_with_it(backend: Backend, device: str) -> None:
    tensors = draw(4, 3, (50, 31), device)
    keys, density = [11, 12, 13], 0.4
    apart = [dare_linear([t], [1.0], density, [k], backend=backend) for t, k in zip(tensors, keys, strict=True)]
    together = dare_linear(tensors, [1.0] * 3, density, keys, backend=backend)
    assert same_bits(together, linear(apart, [1.0] * 3, backend=backend))
    kept = torch.stack(apart) != 0
    assert not torch.equal(kept[0], kept[1])
    # 4650 draws: four standard deviations around the density.
    assert abs(kept.double().mean().item() - density) < 4 * (0.4 * 0.6 / kept.numel()) ** 0.5


def test_dare_linear_of_density_one_is_linear(backend: Backend, device: str) -> None:
    tensors = draw(5, 2, (13, 21), device)
    expected = linear(tensors, [0.8, 0.2], backend=backend)
    assert same_bits(dare_linear(tensors, [0.8, 0.2], 1, [1, 2], backend=backend), expected)


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
    (delta,) = draw(seed, 1, shape)
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


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear([], []), "must match, got 0, 0"),
        (lambda: linear([ONE, ONE], [1.0]), "must match, got 2, 1"),
        (lambda: linear([ONE, ONE.T], [1.0, 1.0]), r"one shape, got \[\(2, 3\), \(3, 2\)\]"),
        (lambda: dare_linear([ONE], [1.0], 0, [0]), r"density must lie in \(0, 1\], got 0"),
        (lambda: dare_linear([ONE], [1.0], float("nan"), [0]), "density"),
        (lambda: dare_linear([ONE], [1.0], 0.5, [0, 1]), "must match, got 1, 1 and 2"),
        (lambda: dare_linear([ONE], [1.0], 0.5, [2**64]), r"keys must lie in \[0, 2\^64\)"),
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
