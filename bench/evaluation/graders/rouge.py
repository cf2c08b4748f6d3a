"""Utility of summaries: ROUGE F1 (Lin 2004), by the package rouge-score.

Safe Delta's table is ROUGE-1 F1 on SamSum by the package `rouge`, which splits at spaces and keeps case and punctuation
as they are; rouge-score lowers case and drops punctuation, so its figures are a little higher.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from safeshard.bench.evaluation.graders.base import Grader, Measure, Verdict
from safeshard.bench.evaluation.prompts import Prompt
from safeshard.streamer.extras import require


class Rouge(Grader):
    """An answer is worth its ROUGE F1 against the target."""

    measures: ClassVar[frozenset[Measure]] = frozenset({"utility"})
    needs_target: ClassVar[bool] = True
    name: Literal["rouge"] = "rouge"
    variant: Literal["rouge1", "rouge2", "rougeL"] = Field("rouge1", description="of single words, pairs, or sequences")

    def grade(self, measure: Measure, prompt: Prompt, answer: str) -> Verdict:
        """Score against the target."""
        score = _scorer(self.variant).score(prompt.target, answer)[self.variant]
        return Verdict(float(score.fmeasure), f"expected {prompt.target!r}")

    @property
    def label(self) -> str:
        """The variant."""
        return f"{self.variant.replace('rouge', 'ROUGE-')} F1"


@lru_cache
def _scorer(variant: str) -> Any:
    return require("rouge_score.rouge_scorer", "evaluate").RougeScorer([variant], use_stemmer=False)
