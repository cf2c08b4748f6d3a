"""How the kernels behave towards a device, seen on one that is not there (`standin.py`, `launches.py`)."""

from __future__ import annotations

import launches
import pytest
import torch
from standin import DEVICE, stand_in
from torch import Tensor
from triton.backends.compiler import GPUTarget

from safeshard.kernels.calibrated.factor import safety_factor
from safeshard.kernels.calibrated.gram import accumulate
from safeshard.kernels.gate import dense_gate, lora_gate
from safeshard.kernels.merge import Sum, dare_linear, linear, linear_of_each
from safeshard.kernels.safedelta.compensation import safe_delta_dense, safe_delta_lora


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("index", [0, 3])
def test_launches_go_to_the_device_of_their_tensors(index: int) -> None:
    with launches.device(GPUTarget("cuda", 90, 32)) as recorded:
        w, b, a = (torch.empty(size, device=f"cuda:{index}") for size in ((64, 48), (64, 16), (16, 48)))
        lora_gate(w, w, [(a, b)])
        accumulate(torch.empty(48, 48, device=f"cuda:{index}"), w)
        linear([w, w], [1.0, 2.0])
    assert len(recorded) == 2 + 4 + 1 + 1 + 2
    assert {launch.device for launch in recorded} == {torch.device("cuda", index)}


def test_64_adapters_take_few_launches_and_no_wait() -> None:
    w, u = draw(1, (96, 80), (96, 80))
    pairs = [tuple(draw(2 + k, (16, 80), (96, 16))) for k in range(64)]
    expected = [gate.cosine.item() for gate in lora_gate(w, u, pairs)]
    with stand_in() as device:
        w, u = w.to(DEVICE), u.to(DEVICE)
        moved = [(a.to(DEVICE), b.to(DEVICE)) for a, b in pairs]
        device.waits.clear()
        device.launches.clear()
        gates = lora_gate(w, u, moved)
        cosines = torch.stack([gate.cosine for gate in gates])
        assert not device.waits
        assert len(device.launches) < 100, device.launches
        assert cosines.tolist() == pytest.approx(expected, abs=1e-6)
        assert len(device.waits) == 1


def test_ranks_that_differ_take_launches_each() -> None:
    w, u = draw(1, (70, 40), (70, 40))
    pairs = [tuple(draw(2 + k, (rank, 40), (70, rank))) for k, rank in enumerate((16, 4, 16, 33, 4))]
    expected = lora_gate(w, u, pairs)
    with stand_in():
        gates = lora_gate(w.to(DEVICE), u.to(DEVICE), [(a.to(DEVICE), b.to(DEVICE)) for a, b in pairs])
        for own, other in zip(gates, expected, strict=True):
            assert own.cosine.item() == pytest.approx(other.cosine.item(), abs=1e-6)
            torch.testing.assert_close(own.projected.cpu(), other.projected, rtol=1e-5, atol=1e-5)


def test_merging_waits_for_nothing() -> None:
    x, y = draw(3, (60, 50), (60, 50))
    with stand_in() as device:
        x, y = x.to(DEVICE), y.to(DEVICE)
        device.waits.clear()
        linear([x, y], [0.8, 0.2])
        dare_linear([x, y], [0.8, 0.2], 0.5, [3, 2**63 + 1])
        dare_linear([x, y], [0.8, 0.2], 0.5, [3, 2**63 + 1], backend="torch")
        dense_gate(x, y, x, project=True)
        accumulate(torch.zeros(50, 50, device=DEVICE), x)
        assert not device.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_sums_are_each_the_same_to_the_bit(dtype: torch.dtype) -> None:
    terms = [1, 2, 2, 1, 2, 1]
    sums = [Sum([x.to(dtype) for x in draw(k, *[(30, 41)] * n)], [0.3 + k, -0.7][:n]) for k, n in enumerate(terms)]
    sums.append(Sum([draw(9, (5, 7))[0]], [2.0]))
    with stand_in() as device:
        moved = [Sum([x.to(DEVICE) for x in each.tensors], each.weights) for each in sums]
        device.launches.clear()
        device.waits.clear()
        formed = linear_of_each(moved)
        assert not device.waits
        assert len(device.launches) <= 2 * 2 + 2 + 2
        assert all(torch.equal(own.cpu(), each.formed()) for own, each in zip(formed, sums, strict=True))


@pytest.mark.parametrize("strength", [0.0, 3e4, 1e12])
def test_safe_delta_waits_twice_a_block(strength: float) -> None:
    """For the losses of columns, which decide what is kept, and for those of the boundary column's rows."""
    x, delta, a, b = draw(4, (300, 96), (40, 96), (8, 96), (40, 8))
    gram = x.T @ x
    factor = safety_factor(gram)
    expected = safe_delta_dense(delta, factor, strength, block_size=32)
    with stand_in() as device:
        own = safety_factor(gram.to(DEVICE))
        assert own.cost is own.cost
        delta, a, b = delta.to(DEVICE), a.to(DEVICE), b.to(DEVICE)
        device.waits.clear()
        result = safe_delta_dense(delta, own, strength, block_size=32)
        assert len(device.waits) <= 2 * 3, device.waits
        assert torch.equal(result.mask.cpu(), expected.mask)
        torch.testing.assert_close(result.delta.cpu(), expected.delta, rtol=1e-4, atol=1e-4)
        device.waits.clear()
        safe_delta_lora(a, b, own, strength, block_size=32)
        assert len(device.waits) <= 2 * 3, device.waits
        device.waits.clear()
        safe_delta_dense(delta, own, strength, selection="row", block_size=32)
        assert len(device.waits) == 1, device.waits
