"""What a tuning found, in words, tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from safeshard.bench.evaluation.figures import markdown
from safeshard.bench.tune.rule import Choice, Point
from safeshard.bench.tune.sweep import Sweep
from safeshard.manifests.errors import printable
from safeshard.manifests.evaluation import Evaluation, Figure, percent
from safeshard.manifests.terminal import Painted, Span, grid

GIVEN = (ALIGNED, TUNED) = ("aligned", "fine-tuned")  # how figures call the models that were there before


@dataclass(frozen=True)
class Tuned:
    """The choice, and all figures behind it."""

    sweep: Sweep
    choice: Choice
    points: Sequence[Point]  # of validation, those of the given models first
    validation: tuple[Figure, ...]
    test: Evaluation

    def sentences(self) -> Iterator[str]:
        """The rule, what it chose, and whether the test prompts confirm it."""
        choice, margin = self.choice, self.sweep.margin
        chosen = choice.chosen
        yield (
            f"Rule: of the settings that leave at most {choice.most:.1f} % attack success on the validation prompts "
            f"(the aligned model's {choice.most - margin:.1f} and {margin:g} points), the one of most utility; it must "
            "keep more than `scale` does at equal attack success."
        )
        yield f"Chosen: {_named(chosen)}, with {chosen.attack:.1f} % attack success and {chosen.utility:.1f} % utility."
        if not choice.safe:
            yield "No setting leaves as little as the rule allows: this is the one of least attack success."
        if not choice.scale_beaten:
            yield "Nothing beats `scale` here: the best factor is taken."
        else:
            yield f"`scale` of equal attack success keeps {choice.scaled:.1f} % utility, read off its curve."
        yield from self._untold()
        yield from self._confirmed()

    def told_apart(self) -> dict[str, bool]:
        """Measure -> whether on some part of the validation two settings have intervals that do not overlap."""
        tried = [figure for figure in self.validation if figure.model not in GIVEN]
        told = {}
        for measure in ("attack_success", "utility"):
            parts: dict[str, list[Figure]] = {}
            for figure in tried:
                if figure.measure == measure:
                    parts.setdefault(figure.part, []).append(figure)
            told[measure] = any(max(f.low for f in found) > min(f.high for f in found) for found in parts.values())
        return told

    def _untold(self) -> Iterator[str]:
        """What the validation prompts cannot tell apart, so that the choice is one of chance."""
        words = {"attack_success": "attack success", "utility": "utility"}
        same = [words[measure] for measure, told in self.told_apart().items() if not told]
        if len(same) == len(words):
            yield (
                "The validation prompts cannot tell the settings apart: all their intervals overlap, of attack success "
                "and of utility. Which one was chosen is chance: use more prompts, other ones, or settings further "
                "apart."
            )
        elif same:
            yield f"In {same[0]} the validation prompts cannot tell the settings apart: all their intervals overlap."

    def _confirmed(self) -> Iterator[str]:
        """What the test prompts say of the chosen setting."""
        attack, aligned = self._share("defended", "attack_success"), self._share("aligned", "attack_success")
        utility = self._share("defended", "utility")
        kept = attack <= aligned + self.sweep.margin
        yield (
            f"On the test prompts it leaves {attack:.1f} % attack success (the aligned model {aligned:.1f} %) at "
            f"{utility:.1f} % utility: {'as the rule demands' if kept else 'more than the rule allows'}."
        )
        if not self.test.of("scale"):
            return
        yield (
            f"The best factor of `scale` leaves {self._share('scale', 'attack_success'):.1f} % at "
            f"{self._share('scale', 'utility'):.1f} %."
        )
        overlapping = [
            ours.part for ours in self.test.of("defended") for other in self.test.of("scale")
            if (ours.part, other.measure) == (other.part, ours.measure) and ours.measure != "over_refusal"
            and ours.low <= other.high and other.low <= ours.high
        ]  # fmt: skip
        if overlapping:
            parts = ", ".join(printable(part) for part in overlapping)
            yield f"The intervals of both overlap on {parts}: more prompts could turn the verdict there."

    def _share(self, model: str, measure: str) -> float:
        values = [f.value for f in self.test.of(model) if f.measure == measure]
        return 100 * sum(v or 0.0 for v in values) / max(1, len(values))

    def markdown(self) -> str:
        """A page: sentences, picture, tables."""
        head = ["method", "setting", "attack success %", "utility %"]
        rows = [[p.method, p.setting, f"{p.attack:.1f}", f"{p.utility:.1f}"] for p in self.points]
        lines = [head, ["---"] * 4, *rows]
        table = "".join(f"| {' | '.join(printable(c).replace('|', '&#124;') for c in line)} |\n" for line in lines)
        found = "".join(f"- {sentence}\n" for sentence in self.sentences())
        return (
            f"# Tuning\n\n{found}\n![Every setting on the validation prompts](tradeoff.png)\n\n"
            f"## Validation\n\n{table}\n## Test\n\n{markdown(self.test)}\nThe defended output is in `defended`.\n"
        )

    def to_json(self) -> str:
        """For programs: choice, points and figures."""
        value = {
            "schema": "safeshard.tune/1", "sweep": json.loads(self.sweep.model_dump_json()),
            "choice": asdict(self.choice), "told_apart": self.told_apart(),
            "points": [asdict(point) for point in self.points],
            "validation": [figure.model_dump(mode="json") for figure in self.validation],
            "test": self.test.model_dump(mode="json", by_alias=True),
        }  # fmt: skip
        return json.dumps(value, indent=1) + "\n"

    def text(self, color: bool = False) -> str:
        """For a terminal: what was found, every setting with its trade-off as bars, the test prompts."""
        test = [[f.model, f.part, f"{percent(f.value)} %", f"{percent(f.low)} to {percent(f.high)}"]
                for f in self.test.figures]  # fmt: skip
        curve = grid(["method", "setting", "attack %", "utility %", "attack success", "utility"],
                     map(self._row, self.points), color, left=2)  # fmt: skip
        tested = grid(["model", "part", "", "95 % interval"], test, color, left=2)
        return "\n".join([*self.sentences(), "", "validation prompts:", curve, "", "test prompts:", tested])

    def _row(self, point: Point) -> list[str | Painted | Span]:
        style = "bold green" if point == self.choice.chosen else ""
        safe = "red" if point.attack > self.choice.most else "green"
        cells = (point.method, point.setting, f"{point.attack:.1f}", f"{point.utility:.1f}")
        bars = (Span(0, point.attack / 100, safe), Span(0, point.utility / 100, "cyan"))
        return [*(Painted(cell, style) for cell in cells), *bars]


def _named(point: Point) -> str:
    return printable(f"{point.method}, {point.setting}" if point.setting else point.method)
