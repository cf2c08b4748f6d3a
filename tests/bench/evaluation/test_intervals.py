"""Intervals against values of the literature and their own laws."""

from __future__ import annotations

import math
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshard.bench.evaluation.intervals import interval, wilson


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),  # Newcombe 1998, table I: method 3, without continuity correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_tabled_it(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_mirrors(case: tuple[int, int]) -> None:
    k, n = case
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    assert not n or low <= k / n <= high
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60), st.integers(0, 20))
def test_what_is_missing_widens(values: list[float], missing: int) -> None:
    value, low, high = interval(values, missing)
    assert value == pytest.approx(sum(values) / len(values))
    narrow = interval(values)
    assert low <= narrow[1] + 1e-12
    assert high >= narrow[2] - 1e-12
    assert low == wilson(sum(values), len(values) + missing)[0]


def test_scores_between_take_the_normal_interval() -> None:
    values = [0.2, 0.4, 0.9, 0.5]
    half = 1.959963984540054 * stdev(values) / 2
    assert interval(values) == pytest.approx((0.5, 0.5 - half, min(1.0, 0.5 + half)))
    assert math.isnan(interval([])[0])
