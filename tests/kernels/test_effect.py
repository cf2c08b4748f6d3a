"""Inner products of the delta that came in and of the one written, against whole deltas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import DEVICE, stand_in
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from safeshard.kernels.effect import Pair, Products, lora_products, products_of_each
from safeshard.kernels.tally import PIECE, WHOLE, Tally

EVERY, CPU = 32, torch.device("cpu")


def dense(old: Tensor, new: Tensor) -> list[float]:
    return [float((x * y).sum()) for x, y in ((old, old), (new, new), (old, new))]


def floats(products: Products) -> list[float]:
    return [value.item() for value in products]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 2100), st.integers(1, 40), st.integers(1, 5), st.integers(1, 7),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99),
)  # fmt: skip
def test_pairs(rows: int, columns: int, rank: int, new_rank: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    a, b, new_a, new_b = (random(*s) for s in ((rank, columns), (rows, rank), (new_rank, columns), (rows, new_rank)))
    old, new = 1.5 * b.double() @ a.double(), -0.25 * new_b.double() @ new_a.double()
    expected = dense(old, new)
    size = math.sqrt(expected[0] * expected[1])
    assert floats(lora_products(a, b, 1.5, new_a, new_b, -0.25)) == [
        pytest.approx(e, rel=1e-12, abs=1e-12 * size) for e in expected
    ]


def test_rank_pairs_that_cancel_keep_their_products() -> None:
    """Sums in fp32 would lose what is left of two large pairs of opposite sign."""
    torch.manual_seed(0)
    a, b, small = torch.randn(2, 50).double(), torch.randn(60, 2).double(), torch.randn(60, 2).double() * 1e-6
    wide_a, wide_b = torch.cat((a, a)), torch.cat((b + small, -b), 1)
    expected = float((small @ a).square().sum())
    assert lora_products(wide_a, wide_b, 1.0, a, b, 1.0).before.item() == pytest.approx(expected, rel=1e-3)


def test_what_stayed_is_the_same_to_the_bit() -> None:
    a, b = torch.randn(3, 40), torch.randn(50, 3)
    before, after, inner = floats(lora_products(a, b, 2.0, a, b, 2.0))
    assert before == after == inner > 0


@pytest.mark.parametrize(("outputs", "inputs"), [(30, 150), (150, 30)])
@pytest.mark.parametrize("stays", ["", "a", "ab"])
def test_a_rank_above_the_width_costs_no_more_than_the_delta(outputs: int, inputs: int, stays: str) -> None:
    """Products of factors, counted: a Gram of the rank would take r (O + I) / (O I) times as many."""
    torch.manual_seed(0)
    rank = 400
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    new_a = a if "a" in stays else torch.randn(rank, inputs)
    new_b = b if "b" in stays else torch.randn(outputs, rank)
    with FlopCounterMode(display=False) as counted:
        found = lora_products(a, b, 1.5, new_a, new_b, 0.5)
    assert counted.get_total_flops() <= 2 * 2 * rank * outputs * inputs
    assert floats(found) == pytest.approx(dense(1.5 * b.double() @ a.double(), 0.5 * new_b.double() @ new_a.double()))


def test_pairs_of_a_wide_rank_are_measured_beside_others() -> None:
    pairs = [drawn(0, 4, 4, torch.float32, ""), drawn(1, 90, 90, torch.float32, ""), drawn(2, 4, 4, torch.float32, "")]
    expected = [floats(lora_products(*p[:6])) for p in pairs]
    with stand_in():
        moved = [Pair(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in p)) for p in pairs]
        found = [floats(p) for p in products_of_each(moved)]
    assert found == [pytest.approx(e, rel=1e-12) for e in expected]


def drawn(seed: int, rank: int, new_rank: int, dtype: torch.dtype, stays: str) -> Pair:
    """A pair of 70 x 600 and what is written of it; `stays` names the sides that are as they were."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    a, b = random(rank, 600), random(70, rank)
    new_a, new_b = a if "a" in stays else random(new_rank, 600).float(), b if "b" in stays else random(70, new_rank)
    return Pair(a, b, 1.5, new_a, new_b, -0.25, dtype, dtype)


def test_a_device_measures_many_together_and_each_as_if_alone() -> None:
    kinds = [
        (4, 4, "", torch.float32),
        (3, 5, "", torch.bfloat16),
        (17, 17, "a", torch.float32),
        (4, 4, "ab", torch.float16),
    ]
    pairs = [drawn(seed, *kinds[seed % 4][:2], kinds[seed % 4][3], kinds[seed % 4][2]) for seed in range(14)]
    expected = [
        floats(lora_products(p.a, p.b, p.scaling, p.new_a.to(p.kind_a), p.new_b.to(p.kind_b), p.new_scaling))
        for p in pairs
    ]
    with stand_in() as device:
        moved = [
            p._replace(
                a=a,
                b=b,
                new_a=a if p.new_a is p.a else p.new_a.to(DEVICE),
                new_b=b if p.new_b is p.b else p.new_b.to(DEVICE),
            )
            for p in pairs
            for a, b in [(p.a.to(DEVICE), p.b.to(DEVICE))]
        ]
        device.launches.clear()
        device.waits.clear()
        together = products_of_each(moved)
        assert len(device.launches) <= 4 * 12
        assert not device.waits
        several, alone = [floats(p) for p in together], [floats(products_of_each([p])[0]) for p in moved]
    assert several == alone
    for own, other in zip(several, expected, strict=True):
        assert own == [pytest.approx(e, rel=1e-12, abs=1e-12 * max(other[:2])) for e in other]


def test_a_device_sees_what_is_left_of_rank_pairs_that_cancel() -> None:
    torch.manual_seed(0)
    a, b, small = torch.randn(2, 50), torch.randn(60, 2), torch.randn(60, 2) * 1e-4
    wide_a, wide_b = torch.cat((a, a)), torch.cat((b + small, -b), 1)
    left = (wide_b[:, :2].double() - b.double()) @ a.double()
    with stand_in():
        wide_a, wide_b = wide_a.to(DEVICE), wide_b.to(DEVICE)
        [own] = products_of_each([Pair(wide_a, wide_b, 1.0, wide_a, wide_b, 1.0, torch.float32, torch.float32)])
        assert own.before.item() == pytest.approx(float(left.square().sum()), rel=1e-6)
        assert floats(own) == [own.before.item()] * 3


@pytest.mark.parametrize("numel", [1, PIECE - 1, PIECE + 5, WHOLE])
def test_small_weights_are_measured_throughout(numel: int) -> None:
    torch.manual_seed(0)
    base, old, new = torch.randn(3, numel)
    tally = Tally(numel, EVERY, CPU)
    for start in range(0, numel, 1000):
        count = min(1000, numel - start)
        for lo, hi in tally.take(count):
            part = slice(start + lo, start + hi)
            tally.add(base[part], old[part] + base[part], new[part] + base[part])
    assert floats(tally.products()) == [
        pytest.approx(e, rel=1e-5, abs=1e-5 * numel) for e in dense(old.double(), new.double())
    ]


def test_a_part_of_a_large_weight_stands_for_it_wherever_it_is_cut() -> None:
    torch.manual_seed(0)
    numel = 3 * EVERY * PIECE + 12_345
    old = torch.randn(numel) * (1 + torch.arange(numel) % 4096 / 4096)
    new = 0.3 * old + 0.1 * torch.randn(numel)
    results, measured = [], set()
    for step in (numel, 1 << 18, 1000):
        tally = Tally(numel, EVERY, CPU)
        count = 0
        for start in range(0, numel, step):
            for lo, hi in tally.take(min(step, numel - start)):
                part = slice(start + lo, start + hi)
                tally.add(old[part], old[part], new[part] + old[part], tuned_is_delta=True)
                count += hi - lo
        results.append(floats(tally.products()))
        measured.add(count)
    (count,) = measured
    assert numel / (1.3 * EVERY) < count < numel / (0.7 * EVERY)
    for result in results:
        assert result == [pytest.approx(e, rel=1e-5) for e in results[0]]
    before, after, inner = results[0]
    exact = dense(old.double(), new.double())
    assert math.sqrt(after / before) == pytest.approx(math.sqrt(exact[1] / exact[0]), rel=5e-3)
    assert inner / math.sqrt(before * after) == pytest.approx(exact[2] / math.sqrt(exact[0] * exact[1]), rel=5e-3)


def test_the_places_of_a_large_weight_differ_from_group_to_group() -> None:
    """So that of heads of 128 rows of 4096 not always the same rows are measured."""
    group = EVERY * PIECE
    tally = Tally(EVERY * group, EVERY, CPU)
    places = {lo % group for lo, _ in tally.take(EVERY * group)}
    assert len(places) == EVERY
