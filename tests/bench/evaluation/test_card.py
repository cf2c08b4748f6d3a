"""Figures in a model card: the Hub reads them, `verify` stays content, doing it twice changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from safeshard import streamer
from safeshard.bench.evaluation import evaluate
from safeshard.bench.evaluation.suite import Suite
from safeshard.manifests import RequestError, load

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


def spoil(card: Path, content: bytes | None) -> None:
    card.unlink()
    if content is None:
        card.symlink_to("/dev/zero")
    elif content:
        card.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", None, b"\xff\xfe", b"---\na: [\n---\nx", b"---\n- 1\n---\nx", b"---\nmodel-index: 3\n---\nx"],
)
def test_a_card_that_takes_no_figures_is_refused_before_any_work(
    tmp_path: Path, tiny: dict[str, str], content: bytes | None
) -> None:
    """Missing, a link, no text, or a front matter that the Hub's library cannot read."""
    out = tmp_path / "defended"
    streamer.scale(aligned=tiny["aligned"], adapter=tiny["adapter"], output=out, factor=0.5, quiet=True)
    spoil(out / "README.md", content)
    with pytest.raises(RequestError, match=r"README\.md: expected a model card to write figures into"):
        evaluate(str(out), suite=SUITE, aligned=tiny["aligned"], output=tmp_path / "results", write_card=True)
    assert not (tmp_path / "results").exists()
    (out / "manifest.json").write_text("{}")
    with pytest.raises(RequestError, match=r"manifest\.json") as refused:
        evaluate(str(out), suite=SUITE, aligned=tiny["aligned"], output=tmp_path / "results", write_card=True)
    assert "README.md" in str(refused.value)
