"""The rule, by hand-made points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshard.bench.tune.rule import Point, choose, decide, scaled_utility

ALIGNED, TUNED = Point("aligned", "", 1, 0), Point("fine-tuned", "", 100, 90)
SCALES = [Point("scale", "0.3", 2, 10), Point("scale", "0.5", 50, 40)]


def test_most_utility_among_the_safe_ones() -> None:
    points = [Point("m", "a", 2, 50), Point("m", "b", 3, 60), Point("m", "c", 3.1, 90)]
    assert choose(points, 3).setting == "b"
    assert choose(points, 1).setting == "a"  # none is safe: the safest
    assert choose([Point("m", "a", 3, 60), Point("m", "b", 2, 60), Point("m", "c", 2, 60)], 3).setting == "b"


def test_a_choice_must_beat_scale_at_equal_attack_success() -> None:
    better = decide([*SCALES, Point("m", "a", 3, 30)], ALIGNED, TUNED)
    assert (better.chosen.setting, better.scale_beaten, better.safe, better.most) == ("a", True, True, 3)
    assert better.scaled == pytest.approx(10 + 30 / 48)
    worse = decide([*SCALES, Point("m", "a", 3, 10.5)], ALIGNED, TUNED)
    assert (worse.chosen, worse.scale_beaten) == (SCALES[0], False)
    assert worse.best["m"].setting == "a"


def test_without_a_safe_setting_it_says_so() -> None:
    made = decide([*SCALES, Point("m", "a", 20, 60)], Point("aligned", "", 0, 0), TUNED, margin=1)
    assert (made.chosen.setting, made.safe) == ("a", False)


def test_scale_alone() -> None:
    made = decide(SCALES, ALIGNED, TUNED)
    assert (made.chosen, made.scale_beaten) == (SCALES[0], False)


@pytest.mark.parametrize(("harm", "task"), [(-1, 5), (0, 10), (10, 20), (15, 35), (20, 50), (60, 70), (100, 90)])
def test_scale_of_equal_safety_lies_between_factors(harm: float, task: float) -> None:
    assert scaled_utility(harm, [(0, 5), (0, 10), (10, 20), (20, 50), (100, 90)]) == task


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=8), st.floats(0, 100))
def test_the_curve_of_scale_never_falls_below_a_safer_factor(curve: list[tuple[float, float]], attack: float) -> None:
    found = scaled_utility(attack, sorted(curve))
    assert all(found >= utility for at, utility in curve if at <= attack)
    assert min(u for _, u in curve) - 1e-9 <= found <= max(u for _, u in curve) + 1e-9
