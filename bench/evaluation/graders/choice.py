"""Utility by multiple choice: the letter that an answer names first."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from safeshard.bench.evaluation.graders.base import Grader, Measure, Verdict
from safeshard.bench.evaluation.prompts import Prompt

_NAMED = re.compile(
    r"\b(?:answer|option|choice)\b[^A-Za-z0-9]*(?:is|would be)?[^A-Za-z0-9]*([A-Z])\b(?!')", re.IGNORECASE
)
_ALONE = re.compile(r"^[^A-Za-z0-9]*([A-Za-z])(?:[).:,*\]]|\s*$|\s*\n)")
_LETTER = re.compile(r"(?<![A-Za-z'])\(?([B-HJ-Z]|[AI](?! [a-z]))\)?(?![A-Za-z'])")


class Choice(Grader):
    """An answer is right if it names the letter of the target."""

    measures: ClassVar[frozenset[Measure]] = frozenset({"utility"})
    needs_target: ClassVar[bool] = True
    name: Literal["choice"] = "choice"

    def grade(self, measure: Measure, prompt: Prompt, answer: str) -> Verdict:
        """Find the letter: at the start, after "answer", or the first capital that stands alone."""
        found = _ALONE.search(answer) or _NAMED.search(answer) or _LETTER.search(answer)
        letter = found[1].upper() if found else ""
        return Verdict(float(letter == prompt.target.strip().upper()), f"named {letter or 'no letter'}")

    @property
    def label(self) -> str:
        """Its name."""
        return "multiple choice"
