"""Symmetric matrices by half: nothing is lost, whatever the size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.kernels.backend import Backend
from safeshard.kernels.calibrated.half import PANEL, pack, packed_size, unpack


def symmetric(seed: int, n: int, device: str) -> torch.Tensor:
    values = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return (values.triu() + values.triu(1).T).to(device)


def test_docstring_example(backend: Backend, device: str) -> None:
    gram = torch.tensor([[1.0, 2], [torch.nan, 3]], device=device)
    assert pack(gram, backend=backend).tolist() == [1, 2, 2, 3]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), n=st.integers(0, 3 * PANEL + 5))
def test_comes_back_bit_for_bit_from_the_upper_triangle(backend: Backend, device: str, seed: int, n: int) -> None:
    gram = symmetric(seed, n, device)
    upper = torch.where(torch.ones_like(gram).triu() == 1, gram, torch.nan)
    packed = pack(upper, backend=backend)
    assert packed.shape == (packed_size(n),)
    assert torch.equal(unpack(packed, n, backend=backend), gram)


def test_both_implementations_lay_it_out_alike(device: str) -> None:
    gram = symmetric(1, 2 * PANEL + 37, device)
    assert torch.equal(pack(gram, backend="torch"), pack(gram, backend="triton"))


def test_panels_are_contiguous_rows_from_the_diagonal_on() -> None:
    n = 2 * PANEL + 3
    gram = symmetric(2, n, "cpu")
    second = pack(gram)[PANEL * n :][: PANEL * (n - PANEL)].view(PANEL, n - PANEL)
    assert torch.equal(second, gram[PANEL : 2 * PANEL, PANEL:])


def test_rows_of_a_wider_matrix(backend: Backend, device: str) -> None:
    wide = torch.zeros(70, 90, device=device)
    wide[:, :70] = symmetric(3, 70, device)
    assert torch.equal(unpack(pack(wide[:, :70], backend=backend), 70), wide[:, :70])


def test_takes_half_of_a_wide_matrix() -> None:
    assert packed_size(28672) < 0.503 * 28672**2


@pytest.mark.parametrize(
    "gram", [torch.zeros(3, 4), torch.zeros(3, 3).double(), torch.zeros(3), torch.zeros(3, 6)[:, ::2]]
)
def test_other_matrices_are_refused(gram: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gram must be square fp32"):
        pack(gram)


@pytest.mark.parametrize("packed", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(4).double(), torch.zeros(8)[::2]])
def test_other_halves_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="packed must be 4 fp32 values"):
        unpack(packed, 2)
