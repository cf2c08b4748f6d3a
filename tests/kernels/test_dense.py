"""Deltas of full checkpoints, tile by tile, against the same in one piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.kernels.dense import interpolate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    shape=st.lists(st.integers(1, 70), max_size=3),
    factor=st.sampled_from([0.0, 1e-3, 0.25, 1 / 3, 0.5, 0.7, 1.0, 1.5, -0.4]),
    aligned=st.sampled_from(DTYPES),
    tuned=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
)
def test_interpolation_rounds_once(
    seed: int, shape: list[int], factor: float, aligned: torch.dtype, tuned: torch.dtype, dtype: torch.dtype
) -> None:
    """Within an ulp of fp32 and of the result's dtype of the formula in fp64, of whatever dtypes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(aligned)
    theirs = (base.float() + 0.1 * torch.randn(shape, generator=generator)).to(tuned)
    [*pieces] = interpolate(base, theirs, factor, dtype)
    got = torch.cat([piece.reshape(-1) for piece in pieces])
    assert got.dtype == dtype
    exact = (base.double() + factor * (theirs.double() - base.double())).reshape(-1)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    arithmetic = 4 * torch.finfo(torch.float32).eps * (base.double().abs() + theirs.double().abs()).reshape(-1)
    assert ((got.double() - exact).abs() <= rounding + arithmetic).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_interpolated_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, theirs = (torch.randn(300_007, generator=generator).to(dtype) for _ in range(2))
    for factor in (0.3, 0.5, 0.9):
        got = torch.cat(list(interpolate(base, theirs, factor, dtype)))
        assert torch.equal(got, torch.lerp(base.float(), theirs.float(), factor).to(dtype))
