"""evaluation.json: what is written is read back; what is malformed is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeshard.manifests.errors import RequestError
from safeshard.manifests.evaluation import EVALUATION_NAME, EvaluatedModel, Evaluation, Figure, load_evaluation, percent


@pytest.fixture
def evaluation() -> Evaluation:
    """Two models, one figure each, one of them without a value."""
    facts = {"part": "p", "measure": "attack_success", "low": 0.1, "high": 0.3, "prompts": 20, "incoherent": 0.0,
             "source": "f", "grader": "g", "sampling": "greedy", "max_tokens": 9}  # fmt: skip
    figures = [Figure.model_validate(facts | {"model": m, "value": v, "ungraded": u}) for m, v, u in
               (("a", 0.2, 0), ("b", None, 20))]  # fmt: skip
    models = tuple(EvaluatedModel(name=name, source=name) for name in ("a", "b"))
    return Evaluation(suite="s", engine="e", versions={"safeshard": "1"}, models=models, figures=tuple(figures))


def test_round_trip(tmp_path: Path, evaluation: Evaluation) -> None:
    (tmp_path / EVALUATION_NAME).write_text(evaluation.to_json())
    assert load_evaluation(tmp_path) == load_evaluation(tmp_path / EVALUATION_NAME) == evaluation
    assert json.loads(evaluation.to_json())["schema"] == "safeshard.evaluation/1"
    assert [figure.value for figure in evaluation.of("b")] == [None]
    assert [percent(figure.value) for figure in evaluation.figures] == ["20.0", "-"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema": "safeshard.evaluation/9"}, "schema"), ({"colour": 1}, "colour"), ({"figures": [{}]}, "figures.0"),
        ({"models": "a"}, "models"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused(
    tmp_path: Path, evaluation: Evaluation, change: dict[str, object], where: str
) -> None:
    (tmp_path / EVALUATION_NAME).write_text(json.dumps(json.loads(evaluation.to_json()) | change))
    with pytest.raises(RequestError) as refused:
        load_evaluation(tmp_path)
    assert any(offence.what.startswith(where) for offence in refused.value.offences)


def test_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        load_evaluation(tmp_path)
    (tmp_path / EVALUATION_NAME).write_text("{")
    with pytest.raises(RequestError):
        load_evaluation(tmp_path)
