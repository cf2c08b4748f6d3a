"""Utility by exact match."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from safeshard.bench.evaluation.graders.base import Grader, Measure, Verdict
from safeshard.bench.evaluation.prompts import Prompt


class Exact(Grader):
    """An answer is right if it is the target."""

    measures: ClassVar[frozenset[Measure]] = frozenset({"utility"})
    needs_target: ClassVar[bool] = True
    name: Literal["exact"] = "exact"
    form: Literal["text", "json"] = Field(
        "text",
        description="text: equal but for white space; json: the first JSON value in the answer equals the target",
    )

    def grade(self, measure: Measure, prompt: Prompt, answer: str) -> Verdict:
        """Compare with the target."""
        if self.form == "text":
            return Verdict(float(answer.split() == prompt.target.split()), f"expected {prompt.target!r}")
        try:
            return Verdict(float(_value(answer) == _value(prompt.target)), f"expected {prompt.target!r}")
        except ValueError:
            return Verdict(0.0, "no JSON")

    @property
    def label(self) -> str:
        """Its form."""
        return "exact match" if self.form == "text" else "exact match of JSON"


def _value(text: str) -> Any:
    """The first JSON object or list of a text, or the whole text as JSON."""
    starts = [at for at in (text.find("{"), text.find("[")) if at >= 0]
    try:
        return json.JSONDecoder().raw_decode(text, min(starts))[0] if starts else json.loads(text)
    except RecursionError as error:
        raise ValueError("too deep") from error
