"""Figures in a model card: the Hub reads them, `verify` stays content, doing it twice changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from safeshard import streamer
from safeshard.bench.evaluation import evaluate
from safeshard.bench.evaluation.suite import Suite
from safeshard.manifests import load

SUITE = Suite.model_validate(
    {
        "name": "s", "sampling": {"max_tokens": 3},
        "parts": [{"name": "h", "measures": "over_refusal", "prompts": {"built_in": "borderline", "limit": 4},
                   "grader": "refusal"}],
    }
)  # fmt: skip


def test_the_card_of_an_output(tmp_path: Path, tiny: dict[str, str]) -> None:
    out = tmp_path / "defended"
    streamer.scale(aligned=tiny["aligned"], adapter=tiny["adapter"], output=out, factor=0.5, quiet=True)
    before = (out / "README.md").read_text()
    request: dict[str, Any] = {
        "suite": SUITE,
        "aligned": tiny["aligned"],
        "output": tmp_path / "results",
        "quiet": True,
    }
    evaluate(str(out), **request)
    assert (out / "README.md").read_text() == before
    made = evaluate(str(out), write_card=True, **request)
    assert made.models[0].manifest_blake3 == load(out).blake3  # by which `report` finds the figures
    assert streamer.verify(out) == []
    text = (out / "README.md").read_text()
    card: Any = ModelCard(text)
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == (
        "over_refusal",
        made.figures[0].value,
        "h",
    )
    assert result.metric_args["grader"] == made.figures[0].grader
    assert "## Evaluation: s" in text
    assert before.split("---\n", 2)[2].strip() in text
    assert set(ModelCard(before).data.to_dict()) <= set(card.data.to_dict())
    evaluate(str(out), write_card=True, **request)
    assert (out / "README.md").read_text() == text
    assert streamer.verify(out) == []
