"""Quantised weights in their codes: decoded, and V (V^T B) and |V|_F^2 of them, against the same formulas in fp64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeshard.kernels.alignment import tiles
from safeshard.kernels.alignment.coded import Coded, Weight, decoded
from safeshard.kernels.backend import Backend
from safeshard.kernels.coded_products import project
from safeshard.kernels.gate import lora_gate

FP8 = {"tensor": (None, None), "row": (1, None), "128 x 128": (128, 128), "16 x 40": (16, 40), "3 x 1": (3, 1)}
KINDS = [*FP8, "mxfp4", "plain", "transposed"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def draw(kind: str, rows: int, columns: int, seed: int, device: str) -> tuple[Weight, Tensor]:
    """A weight (O x I; of mxfp4 I is a multiple of 32), and what it is in fp64, by torch's dtypes and a table."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("plain", "transposed"):
        plain = torch.randn(columns, rows, generator=generator).bfloat16()
        plain = plain.T if kind == "transposed" else plain.reshape(rows, columns)
        return plain.to(device), plain.double()
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    if kind == "mxfp4":
        table = torch.tensor(E2M1 + tuple(-value for value in E2M1)).double()
        codes = codes[:, : columns // 2]
        values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).view(rows, columns)
        scales = torch.randint(120, 130, (rows, columns // 32), generator=generator, dtype=torch.uint8)
        exact = values * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)
        return Coded("e2m1", codes.to(device), scales.to(device), (1, 32)), exact
    codes[(codes & 0x7F) == 0x7F] = 0x80
    height, width = (size or whole for size, whole in zip(FP8[kind], (rows, columns), strict=True))
    scales = torch.rand((-(-rows // height), -(-columns // width)), generator=generator) / 64
    grid = scales.double().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    exact = codes.view(torch.float8_e4m3fn).double() * grid
    return Coded("e4m3", codes.to(device), scales.to(device), (height, width)), exact


def check(weights: list[tuple[Weight, Tensor]], factors: list[Tensor], backend: Backend, device: str) -> None:
    (aligned, exact_aligned), (unaligned, exact_unaligned) = weights
    found = project(aligned, unaligned, [factor.to(device) for factor in factors], backend=backend)
    v = exact_aligned - exact_unaligned
    assert found.squared_norm.item() == pytest.approx(v.square().sum().item(), rel=1e-6)
    for own, factor in zip(found.projected, factors, strict=True):
        exact = v @ (v.T @ factor.double())
        assert own.shape == factor.shape
        assert (own.cpu() - exact).norm() <= 1e-6 * v.norm().square() * factor.double().norm()


@settings(deadline=None, max_examples=25)
@given(
    kinds=st.sampled_from([pair for pair in product(KINDS, KINDS) if set(pair) - {"plain", "transposed"}]),
    rows=st.integers(1, 150), columns=st.integers(1, 150), ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_matches_fp64(
    backend: Backend, device: str, kinds: tuple[str, str], rows: int, columns: int, ranks: list[int], seed: int
) -> None:
    columns = -(-columns // 32) * 32 if "mxfp4" in kinds else columns
    weights = [draw(kind, rows, columns, seed + n, device) for n, kind in enumerate(kinds)]
    check(weights, [torch.randn(rows, rank) for rank in ranks], backend, device)


@pytest.mark.parametrize("kinds", [(kind, other) for kind in [*FP8, "mxfp4"] for other in (kind, "plain")])
@pytest.mark.parametrize(("rows", "columns"), [(600, 1344), (96, 6400)])
def test_torch_matches_fp64_over_several_strips(kinds: tuple[str, str], rows: int, columns: int) -> None:
    assert rows * columns > tiles.TILE_ELEMENTS
    weights = [draw(kind, rows, columns, n, "cpu") for n, kind in enumerate(kinds)]
    assert 0 < tiles.strip_columns(weights[0][0], weights[1][0]) < columns
    check(weights, [torch.randn(rows, 16), torch.randn(rows, 5)], "torch", "cpu")


@pytest.mark.parametrize("kind", [*FP8, "mxfp4"])
def test_a_weight_is_decoded_as_its_codes_say(kind: str) -> None:
    weight, exact = draw(kind, 70, 160, 3, "cpu")
    assert torch.equal(decoded(weight).double(), exact.float().double())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # NumPy, under the interpreter
def test_every_code_and_every_exponent(backend: Backend, device: str) -> None:
    """Against torch's own conversion of E4M3, and the numbers that OCP gives; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    expected = codes.view(torch.float8_e4m3fn).float()
    fp8 = Coded("e4m3", codes.to(device), torch.ones((1, 1), device=device), (256, 1))
    assert torch.equal(decoded(fp8).cpu().nan_to_num(1e9), expected.nan_to_num(1e9))
    rows = torch.arange(256, dtype=torch.uint8).view(256, 1)
    mx = Coded("e2m1", torch.full((256, 16), 0x22, dtype=torch.uint8, device=device), rows.to(device), (1, 32))
    powers = [2.0 ** (s - 127) for s in range(255)]
    assert decoded(mx)[:255, 0].tolist() == powers
    assert decoded(mx)[255].isnan().all()
    for weight, finite in ((fp8, [n for n in range(256) if n & 0x7F != 0x7F]), (mx, list(range(255)))):
        # V V^T B of a B that picks one row: V's row times its sum of squares, or NaN where that is.
        zero = torch.zeros(weight.shape, device=device)
        for row in (finite[5], finite[100], finite[-1]):
            one = torch.zeros(256, 1, device=device)
            one[row] = 1
            known = Coded(weight.kind, weight.codes[finite], *_scales_of(weight, finite))
            (z,), norm = project(known, zero[finite], [one[finite]], backend=backend)
            v = decoded(known).double().cpu()
            if v.abs().max() < 1e9:
                torch.testing.assert_close(z.cpu().double(), v @ v[finite.index(row)][:, None], rtol=1e-6, atol=0)
                assert norm.item() == pytest.approx(v.square().sum().item(), rel=1e-6)
        (z,), norm = project(weight, zero, [torch.ones(256, 1, device=device)], backend=backend)
        assert norm.isnan()


def _scales_of(weight: Coded, rows: list[int]) -> tuple[Tensor, tuple[int, int]]:
    if weight.kind == "e2m1":
        return weight.scales[rows], weight.block
    return weight.scales, (len(rows), 1)


@pytest.mark.parametrize("kind", ["128 x 128", "mxfp4"])
def test_gates_are_those_of_decoded_weights(backend: Backend, device: str, kind: str) -> None:
    (aligned, a), (unaligned, u) = (draw(kind, 140, 96, seed, device) for seed in (1, 2))
    pairs = [(torch.randn(4, 96, device=device), torch.randn(140, 4, device=device)) for _ in range(2)]
    gates = lora_gate(aligned, unaligned, pairs, backend=backend)
    for gate, (left, right) in zip(gates, pairs, strict=True):
        v, delta = a - u, right.cpu().double() @ left.cpu().double()
        projected = v @ (v.T @ delta) / v.norm()
        cosine = (projected * delta).sum() / (projected.norm() * delta.norm())
        assert gate.cosine.item() == pytest.approx(cosine.item(), abs=1e-6)


def test_a_gate_beyond_the_range_of_fp32_is_that_of_scaled_weights() -> None:
    weight, _ = draw("row", 40, 50, 1, "cpu")
    assert isinstance(weight, Coded)
    small = Coded("e4m3", weight.codes, weight.scales * 1e-25, weight.block)
    pair = (torch.randn(3, 50), torch.randn(40, 3))
    zero = torch.zeros(40, 50)
    (expected,), (found,) = (lora_gate(each, zero, [pair], backend="torch") for each in (weight, small))
    assert found.cosine.item() == pytest.approx(expected.cosine.item(), abs=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = torch.zeros((4, 32), dtype=torch.uint8), torch.ones((4, 1))
    with pytest.raises(ValueError, match=r"\(1, 1\) scales"):
        Coded("e4m3", codes, scales, (4, 32))
    with pytest.raises(ValueError, match="needs codes and scales"):
        Coded("e4m3", codes, scales.byte(), (1, 32))
    with pytest.raises(ValueError, match="for each 32"):
        Coded("e2m1", codes, scales.byte(), (1, 64))
    with pytest.raises(ValueError, match="of one shape"):
        project(Coded("e4m3", codes, scales, (1, 32)), torch.zeros(4, 33), [torch.zeros(4, 1)])
