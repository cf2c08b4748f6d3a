"""Evaluations beside the outputs that they are of: found by the hash of the manifest, compared where measured alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from safeshard.manifests.evaluation import MEASURES, EvaluatedModel, Evaluation, Figure

CONDITIONS = ("part", "measure", "prompts", "source", "grader", "sampling", "max_tokens")


@dataclass(frozen=True)
class Measured:
    """Evaluations of one suite under equal conditions, whose figures may hence stand in one picture."""

    evaluations: tuple[Evaluation, ...]

    @property
    def suite(self) -> str:
        return self.evaluations[0].suite

    @cached_property
    def models(self) -> dict[str, tuple[EvaluatedModel, list[Figure]]]:
        """All models with their figures, by name."""
        found: dict[str, tuple[EvaluatedModel, list[Figure]]] = {}
        for evaluation in self.evaluations:
            figures: dict[str, list[Figure]] = {}
            for figure in evaluation.figures:
                figures.setdefault(figure.model, []).append(figure)
            found |= {model.name: (model, figures.get(model.name, [])) for model in evaluation.models}
        return found

    @cached_property
    def outputs(self) -> dict[str, list[Figure]]:
        """The figures of outputs, by the hashes of their manifests."""
        return {m.manifest_blake3: figures for m, figures in self.models.values() if m.manifest_blake3 is not None}

    @property
    def measures(self) -> list[str]:
        """What was measured, in the order in which tables show it."""
        known = {figure.measure for evaluation in self.evaluations for figure in evaluation.figures}
        return [measure for measure in MEASURES if measure in known]


def grouped(evaluations: Sequence[Evaluation]) -> list[Measured]:
    """Evaluations of equal conditions together, unless they disagree about a model: then prompts were others."""
    groups: list[list[Evaluation]] = []
    for evaluation in evaluations:
        home = next((group for group in groups if all(_alike(evaluation, other) for other in group)), None)
        if home is None:
            groups.append([evaluation])
        else:
            home.append(evaluation)
    return [Measured(tuple(group)) for group in groups]


def share(figures: Iterable[Figure], measure: str) -> tuple[float, float, float] | None:
    """A measure's value and interval: the means over its parts; None where one of them has no value."""
    found = [figure for figure in figures if figure.measure == measure]
    values = [figure.value for figure in found if figure.value is not None]
    if not found or len(values) < len(found):
        return None
    return fmean(values), fmean(f.low for f in found), fmean(f.high for f in found)


def _alike(one: Evaluation, other: Evaluation) -> bool:
    if one.suite != other.suite or _conditions(one) != _conditions(other):
        return False
    mine, theirs = ({model.name: model for model in each.models} for each in (one, other))
    return all(mine[n] == theirs[n] and one.of(n) == other.of(n) for n in mine.keys() & theirs.keys())


def _conditions(evaluation: Evaluation) -> set[tuple[object, ...]]:
    return {tuple(getattr(figure, name) for name in CONDITIONS) for figure in evaluation.figures}
