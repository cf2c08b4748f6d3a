"""Merges against PEFT itself and against entry-by-entry sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import task_arithmetic
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.ground.philox import philox_words
from safeshard.kernels.merge import COUNTERS, dare_linear, linear
from safeshard.kernels.projection import WEIGHT_DTYPES

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 60))
WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4)  # torch adds up to four in order
KEYS = st.integers(0, 2**64 - 1)


def draw(seed: int, count: int, shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


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
    ],
)
def test_bad_requests_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
