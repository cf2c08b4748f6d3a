"""Gram matrices against X^T X in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.calibrated.gram import PANEL, SLAB, accumulate, symmetrize

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def inputs(seed: int, n: int, size: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded inputs with a mean, so that the entries of the Gram do not cancel."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, size, generator=generator) + 0.5).to(device, dtype)


def upper_error(gram: Tensor, x: Tensor) -> float:
    """Largest error of the upper triangle, relative to the bound |x_i| |x_j| of its entry."""
    exact = x.double().T @ x.double()
    bound = exact.diagonal().sqrt()
    errors = (gram.double() - exact).triu().abs() / (bound[:, None] * bound[None, :]).clamp_min(1e-30)
    return errors.max().item()


def test_docstring_example(backend: Backend, device: str) -> None:
    gram = torch.zeros(2, 2, device=device)
    accumulate(gram, torch.tensor([[1.0, 2], [3, 4]], device=device), backend=backend)
    assert gram.triu().tolist() == [[10, 14], [0, 20]]
    symmetrize(gram)
    assert gram.tolist() == [[10, 14], [14, 20]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), n=st.integers(0, 100), size=st.integers(1, 130), dtype=st.sampled_from(DTYPES))
def test_matches_fp64(backend: Backend, device: str, seed: int, n: int, size: int, dtype: torch.dtype) -> None:
    x = inputs(seed, n, size, device, dtype)
    gram = torch.zeros(size, size, device=device)
    accumulate(gram, x, backend=backend)
    assert upper_error(gram, x) < 1e-6


@pytest.mark.parametrize(("n", "size"), [(SLAB + 37, 65), (20, 2 * PANEL + 3)])
def test_over_several_slabs_and_panels(device: str, n: int, size: int) -> None:
    x = inputs(1, n, size, device, torch.bfloat16)
    gram = torch.zeros(size, size, device=device)
    accumulate(gram, x, backend="torch")
    assert upper_error(gram, x) < 2e-6
    symmetrize(gram)
    assert torch.equal(gram, gram.T)
    assert upper_error(gram, x) < 2e-6


def test_no_tokens_add_nothing(backend: Backend, device: str) -> None:
    gram = torch.full((70, 70), 3.0, device=device)
    accumulate(gram, torch.empty(0, 70, device=device), backend=backend)
    assert (gram == 3).all()


def test_batches_add_up(backend: Backend, device: str) -> None:
    x = inputs(2, 130, 67, device)
    gram = torch.zeros(67, 67, device=device)
    for batch in torch.split(x, [1, 64, 0, 65]):
        accumulate(gram, batch, backend=backend)
    assert upper_error(gram, x) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_small_integers_are_exact(backend: Backend, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-16, 17, (200, 66), generator=generator).to(device, dtype)
    gram = torch.zeros(66, 66, device=device)
    accumulate(gram, x, backend=backend)
    assert torch.equal(gram.triu().double(), (x.double().T @ x.double()).triu())


def test_fp32_operands_keep_all_their_bits(backend: Backend, device: str) -> None:
    x = torch.full((1, 16), 1 + 2.0**-11, device=device)
    gram = torch.zeros(16, 16, device=device)
    accumulate(gram, x, backend=backend)
    assert (gram.triu() == torch.full_like(gram, (1 + 2.0**-11) ** 2).triu()).all()


@pytest.mark.parametrize("layout", ["transposed", "columns of a wider tensor"])
def test_strided_inputs(backend: Backend, device: str, layout: str) -> None:
    wide = inputs(4, 60, 90, device)
    x = wide.T if layout == "transposed" else wide[:, 7:48]
    size = x.shape[1]
    storage = torch.zeros(size, size + 5, device=device)
    accumulate(storage[:, :size], x, backend=backend)
    assert upper_error(storage[:, :size], x) < 1e-6
    assert (storage[:, size:] == 0).all()


def test_symmetrize_reads_only_the_upper_triangle() -> None:
    size = PANEL + 5
    upper = inputs(5, size, size, "cpu").triu()
    gram = upper + torch.full((size, size), torch.nan).tril(-1)
    gram[upper == 0] = torch.nan
    symmetrize(gram)
    assert torch.equal(gram, upper + upper.triu(1).T)


@pytest.mark.parametrize(
    ("gram", "x", "message"),
    [
        (torch.zeros(3, 3).double(), torch.zeros(2, 3), "gram must be a square fp32"),
        (torch.zeros(3, 4), torch.zeros(2, 3), r"gram must be a square fp32 matrix, got \(3, 4\)"),
        (torch.zeros(3), torch.zeros(2, 3), "gram must be a square fp32"),
        (torch.zeros(3, 6)[:, ::2], torch.zeros(2, 3), "contiguous rows"),
        (torch.zeros(3, 3), torch.zeros(2, 4), r"x must be n x 3, got \(2, 4\)"),
        (torch.zeros(3, 3), torch.zeros(1, 2, 3), "x must be n x 3"),
        (torch.zeros(3, 3), torch.zeros(2, 3).double(), "got torch.float64"),
        (torch.zeros(3, 3), torch.zeros(2, 3, device="meta"), "share one device"),
    ],
)
def test_wrong_inputs_are_refused(gram: Tensor, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accumulate(gram, x)
