"""The graders by name; adding one is a file and a row here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from safeshard.bench.evaluation.graders.base import Grader
from safeshard.bench.evaluation.graders.choice import Choice
from safeshard.bench.evaluation.graders.exact import Exact
from safeshard.bench.evaluation.graders.guard import Guard
from safeshard.bench.evaluation.graders.judge import Judge
from safeshard.bench.evaluation.graders.keywords import Keywords
from safeshard.bench.evaluation.graders.refusal import Refusal
from safeshard.bench.evaluation.graders.rouge import Rouge
from safeshard.bench.evaluation.graders.words import Words

GRADERS: dict[str, type[Grader]] = {
    "keywords": Keywords, "refusal": Refusal, "words": Words, "guard": Guard, "judge": Judge,
    "exact": Exact, "choice": Choice, "rouge": Rouge,
}  # fmt: skip


def _tag(value: Any) -> str | None:
    name = value.name if isinstance(value, Grader) and hasattr(value, "name") else value
    name = name.get("name") if isinstance(name, dict) else name
    return name if isinstance(name, str) and name in GRADERS else None


AnyGrader = Annotated[
    Annotated[Keywords, Tag("keywords")]
    | Annotated[Refusal, Tag("refusal")]
    | Annotated[Words, Tag("words")]
    | Annotated[Guard, Tag("guard")]
    | Annotated[Judge, Tag("judge")]
    | Annotated[Exact, Tag("exact")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Rouge, Tag("rouge")],
    Discriminator(_tag, custom_error_type="grader", custom_error_message=f"a grader, one of {', '.join(GRADERS)}"),
    BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),  # of defaults
]
