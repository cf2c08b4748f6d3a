"""Gates of numbers whose squares leave fp32, and of columns that cancel, against the plain formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.gate import dense_gate, lora_gate


@pytest.fixture(autouse=True)
def _on_a_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("on a device the gate is not computed again")


SCALES = [1e-30, 1e-22, 1.0, 1e18, 1e30]


def exact(v: Tensor, delta: Tensor) -> tuple[float, Tensor]:
    """cos(P D, D) and P = V V^T / |V|_F in fp64, of V and D brought to ordinary size first."""
    unit = v.double() / v.abs().max().double()
    d = delta.double() / delta.double().abs().max()
    p = unit @ unit.T / unit.norm()
    projected = p @ d
    cosine = (projected * d).sum() / (projected.norm() * d.norm())
    return cosine.item(), p * v.abs().max().double()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale_v", SCALES)
@pytest.mark.parametrize("scale_d", [1e-30, 1e-8, 1.0, 1e25])
def test_lora_gate_whatever_the_size(backend: Backend, device: str, scale_v: float, scale_d: float) -> None:
    v, a, b = drawn(1, 24, 20) * scale_v, drawn(2, 3, 20), drawn(3, 24, 3) * scale_d
    cosine, p = exact(v, b.double() @ a.double())
    (gate,) = lora_gate(v.to(device), torch.zeros_like(v).to(device), [(a.to(device), b.to(device))], backend=backend)
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)
    expected = (p @ b.double()).float()
    if expected.isfinite().all() and expected.abs().max() > 1e-30:
        torch.testing.assert_close(gate.projected.cpu(), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


@pytest.mark.parametrize("shape", [(24, 20), (20, 24)])
@pytest.mark.parametrize("scale_v", SCALES)
@pytest.mark.parametrize("scale_d", [1e-25, 1.0, 1e22])
def test_dense_gate_whatever_the_size(
    backend: Backend, device: str, shape: tuple[int, int], scale_v: float, scale_d: float
) -> None:
    aligned = torch.zeros(shape)  # so that D is exact beside a V of any size
    v, delta = drawn(1, *shape) * scale_v, drawn(2, *shape) * scale_d
    cosine, p = exact(v, delta)
    gate = dense_gate(aligned.to(device), -v.to(device), delta.to(device), project=True, backend=backend)
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)
    expected = (p @ delta.double()).float()
    if expected.isfinite().all() and expected.abs().max() > 1e-30:
        torch.testing.assert_close(gate.projected.cpu(), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-6])
def test_columns_that_cancel_leave_an_exact_cosine(backend: Backend, device: str, left: float) -> None:
    v, b, a = drawn(1, 24, 20), drawn(2, 24, 1), drawn(3, 1, 20)
    pair = torch.cat((a, a)), torch.cat((b, -b + left * drawn(4, 24, 1)), dim=1)
    cosine, _ = exact(v, pair[1].double() @ pair[0].double())
    (gate,) = lora_gate(
        v.to(device), torch.zeros_like(v).to(device), [tuple(t.to(device) for t in pair)], backend=backend
    )
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)


def test_one_extreme_adapter_leaves_the_bits_of_its_neighbours(backend: Backend, device: str) -> None:
    v, a, b = (drawn(seed, *shape).to(device) for seed, shape in enumerate(((24, 20), (3, 20), (24, 3))))
    zero = torch.zeros_like(v)
    (alone,) = lora_gate(v, zero, [(a, b)], backend=backend)
    first, _, last = lora_gate(v, zero, [(a, b), (a, b * 1e-36), (a, b)], backend=backend)
    for gate in (first, last):
        assert torch.equal(gate.cosine, alone.cosine)
        assert torch.equal(gate.projected, alone.projected)
