"""Axes, pictures by layer, the comparison and what evaluations share, against the values that they show."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import evaluated, gated, ridge

from safeshard.manifests import Manifest
from safeshard.manifests.evaluation import Evaluation
from safeshard.manifests.report import page
from safeshard.manifests.report.axes import Axis, axis_of, round_values
from safeshard.manifests.report.evaluations import grouped, share
from safeshard.manifests.report.layers import by_layer

Reader = Callable[[str], Any]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    high = low + width
    values = [value for value, _ in round_values(low, high)]
    assert 1 <= len(values) <= 8
    steps = {round(b - a, 9) for a, b in pairwise(values)}
    assert max(steps, default=0.0) - min(steps, default=0.0) <= 1e-6 * max(1.0, abs(low))
    rounding = 1e-6 * width + 1e-12 * abs(low)
    assert all(low - rounding <= value <= high + rounding for value in values)
    for _, text in round_values(0, width):
        digits = text.replace(".", "").replace("-", "").strip("0")
        assert len(digits.split("e")[0]) <= 3


def test_ticks_of_known_ranges() -> None:
    assert [text for _, text in round_values(0, 1)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [text for _, text in round_values(0, 3, whole=True)] == ["0", "1", "2", "3"]
    assert [text for _, text in Axis(0.05, 2000, 0, 100, log=True).ticks] == ["0.1", "1", "10", "100", "1000"]


def test_an_axis_is_logarithmic_where_values_are_far_apart() -> None:
    far, near = axis_of([0.01, 1, 10], 0, 100), axis_of([1, 2, 3], 100, 0)
    assert far.log
    assert far.at(1) - far.at(0.1) == pytest.approx(far.at(10) - far.at(1), abs=0.2)
    assert not near.log
    assert near.at(1) - near.at(2) == pytest.approx(near.at(2) - near.at(3), abs=0.2)
    assert axis_of([5, 5], 0, 9).low < 5 < axis_of([5, 5], 0, 9).high
    assert axis_of([-1e308, 1e308], 0, 9).at(0) == pytest.approx(4.5, abs=0.1)


def test_pictures_by_layer(example: Manifest) -> None:
    modules = ridge(example).modules
    pictures = {picture.y_name: picture for picture in by_layer(modules)}
    assert list(pictures) == ["penalty", "leak", "share of the norm left"]
    for name, of in (("penalty", lambda m: m.penalty), ("leak", lambda m: m.leak)):
        picture = pictures[name]
        assert picture.numbers is not None
        for layer, low, middle, high, count in picture.numbers.rows:
            values = [of(m) for m in modules if m.name.startswith(f"model.layers.{layer}.")]
            expected = [f"{value:.5g}" for value in (min(values), median(values), max(values))]
            assert ([low, middle, high], count) == (expected, len(values))
        dots = [mark for mark in picture.marks if mark.kind == "circle"]
        assert sorted(float(d.place["cy"]) for d in dots) == sorted(picture.y.at(of(m)) for m in modules)
    assert pictures["penalty"].y.log
    assert by_layer(example.modules) == []


def test_the_table_compares(example: Manifest, read: Reader) -> None:
    outputs = {"a": ridge(example, leak=0.008), "b": ridge(example, leak=0.016), "c": gated(example)}
    evaluation = evaluated(outputs)
    found = read(page(outputs.items(), [evaluation]))
    cells = [text for attributes, text in found.named("td") if "data-head" in attributes]
    assert "leak 0.008" in cells  # only what differs
    assert "leak 0.016" in cells
    assert 'seed 0, threshold 0.35, weights [0.8, 0.2], combine "linear"' in cells
    for figure in evaluation.figures[6:]:
        assert f"{100 * figure.value:.1f} {100 * figure.low:.1f} to {100 * figure.high:.1f}" in cells
    assert {f"{100 * m.leak:.3g} %" for m in outputs.values() if m.leak} <= set(cells)
    marks = [text for _, text in found.named("title") if "attack success" in text]
    assert len(marks) == 5
    assert "fine-tuned: 10.0 % attack success, 20.0 % utility" in marks
    [(picture, _)] = [e for e in found.named("svg") if "Trade-off" in (e[0].get("aria-label") or "")]
    assert "Least attack success: aligned, 0.0 % at 0.0 % utility" in picture["aria-label"]


def test_evaluations_share_a_picture_only_where_they_may(example: Manifest) -> None:
    outputs = {"a": ridge(example), "b": gated(example)}
    one = evaluated(outputs)

    def changed(name: str, **change: object) -> Evaluation:
        """The evaluation with another value in every figure of a model."""
        figures = [f.model_copy(update=change) if f.model == name else f for f in one.figures]
        return one.model_copy(update={"figures": tuple(figures)})

    def only(evaluation: Evaluation, *names: str) -> Evaluation:
        return evaluation.model_copy(
            update={"models": tuple(m for m in evaluation.models if m.name in names),
                    "figures": tuple(f for f in evaluation.figures if f.model in names)}
        )  # fmt: skip

    assert len(grouped([only(one, "aligned", "a"), only(one, "aligned", "b")])) == 1
    assert len(grouped([only(one, "aligned", "a"), only(changed("aligned", value=0.01, low=0.0), "aligned", "b")])) == 2
    assert len(grouped([only(one, "a"), only(changed("b", grader="another"), "b")])) == 2
    assert len(grouped([one, one.model_copy(update={"suite": "another"})])) == 2
    [group] = grouped([one])
    assert group.outputs == {m.manifest_blake3: one.of(m.name) for m in one.models if m.manifest_blake3}
    assert group.measures == ["attack_success", "over_refusal", "utility"]


def test_a_share_is_the_mean_of_its_parts(example: Manifest) -> None:
    figures = [f for f in evaluated({}).figures if f.measure == "attack_success"]
    assert share(figures, "attack_success") == pytest.approx((0.05, 0.025, 0.1))
    assert share(figures, "utility") is None
    assert share([figures[0].model_copy(update={"value": None})], "attack_success") is None
