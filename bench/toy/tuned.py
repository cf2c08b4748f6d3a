"""What `tune`'s rule finds on one seed at a time, from the validation prompts alone, against the best on the test's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safeshard.bench.toy.table import MARGIN, TRAINED, Key, Line, Row, lines
from safeshard.bench.tune.rule import Point, decide

MODELS = ("dirty-full", "dirty-lora")


@dataclass(frozen=True)
class Found:
    """One seed of one fine-tune."""

    model: str
    seed: int
    chosen: Point  # as the test judges it
    best: Point  # of the settings that the test calls no less safe than the rule allows, or than the chosen one is
    beats_scale: bool

    @property
    def gap(self) -> float:
        """Points of task accuracy that the choice leaves behind."""
        return max(0.0, self.best.utility - self.chosen.utility)


def found(rows: Sequence[Row]) -> list[Found]:
    """Every seed of both useful fine-tunes that all settings were run on."""
    validation, test = lines(rows, "validation"), lines(rows, "test")
    return [
        _one(validation, test, model, seed)
        for model in MODELS
        if (model, "fine-tuned", "") in test
        for seed in sorted(test[model, "fine-tuned", ""].values["harm"])
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A table, a row a seed."""
    shares = "harmful % / task %"
    head = ["model", "seed", "chosen on validation", shares, "best on the test", shares, "gap"]
    body = [
        [each.model, str(each.seed), f"{each.chosen.method}, {each.chosen.setting}", _shares(each.chosen),
         f"{each.best.method}, {each.best.setting}", _shares(each.best), f"{each.gap:.0f}"]
        for each in found(rows)
    ]  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *body])


def _shares(point: Point) -> str:
    return f"{point.attack:.0f} / {point.utility:.0f}"


def _one(validation: Mapping[Key, Line], test: Mapping[Key, Line], model: str, seed: int) -> Found:
    keys = [k for k in validation if k[0] == model and k[1] not in TRAINED and seed in validation[k].values["harm"]]
    ends = [("aligned", "aligned", ""), (model, "fine-tuned", "")]
    aligned, tuned = (_point(validation[key], seed) for key in ends)
    choice = decide([_point(validation[key], seed) for key in keys], aligned, tuned, MARGIN)
    points = {key: _point(test[key], seed) for key in keys}
    chosen = points[model, choice.chosen.method, choice.chosen.setting]
    most = max(chosen.attack, _point(test["aligned", "aligned", ""], seed).attack + MARGIN)
    best = max((p for p in points.values() if p.attack <= most), key=lambda p: (p.utility, -p.attack))
    return Found(model, seed, chosen, best, choice.scale_beaten)


def _point(line: Line, seed: int) -> Point:
    return Point(line.key[1], line.key[2], line.values["harm"][seed], line.values["task"][seed])
