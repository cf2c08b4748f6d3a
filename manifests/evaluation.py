"""`evaluation.json`: what models answered to a suite, as figures. Written by `safeshard evaluate`, shown by reports."""

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safeshard.manifests.errors import Offence, RequestError

EVALUATION_NAME = "evaluation.json"
MAX_EVALUATION_BYTES = 64 << 20
MEASURES = {"attack_success": "attack success", "over_refusal": "over-refusal", "utility": "utility"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(_Record):
    """One share or mean score, 0 to 1, and all that it depends on."""

    model: str
    part: str
    measure: Literal["attack_success", "over_refusal", "utility"]
    value: float | None = Field(ge=0, le=1, description="None where no answer could be graded")
    low: float = Field(ge=0, le=1, description="of the 95 % interval; what could not be graded widens it")
    high: float = Field(ge=0, le=1)
    prompts: int = Field(ge=0)
    ungraded: int = Field(ge=0, description="answers that the grader's model failed on, or said no sense about")
    incoherent: float | None = Field(ge=0, le=1, description="share of answers that are no language")
    source: str = Field(description="of the prompts")
    grader: str
    sampling: str
    max_tokens: int | None


class EvaluatedModel(_Record):
    """One model, by the name that figures call it."""

    name: str
    source: str
    base: str | None = None
    manifest_blake3: str | None = Field(default=None, description="of an output of safeshard: its manifest's hash")


class Evaluation(_Record):
    """All figures of one evaluation."""

    schema_: Literal["safeshard.evaluation/1"] = Field(default="safeshard.evaluation/1", alias="schema")
    suite: str
    engine: str
    versions: dict[str, str]
    models: tuple[EvaluatedModel, ...]
    figures: tuple[Figure, ...]

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def of(self, model: str) -> list[Figure]:
        """The figures of one model."""
        return [figure for figure in self.figures if figure.model == model]

    def to_json(self) -> str:
        """Its text on the disk."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.json, or that of a folder.

    Raises:
        RequestError: there is none, or it is malformed.
    """
    file = path / EVALUATION_NAME if path.is_dir() else path
    try:
        if not file.is_file():
            raise FileNotFoundError(2, "no such file")
        if (size := file.stat().st_size) > MAX_EVALUATION_BYTES:
            raise RequestError(Offence(str(file), "", f"at most {MAX_EVALUATION_BYTES} bytes", str(size)))
        return Evaluation.model_validate_json(file.read_bytes())
    except OSError as error:
        raise RequestError(Offence(str(file), "", "an evaluation", error.strerror or str(error))) from None
    except ValidationError as error:
        raise RequestError(
            [Offence(str(file), ".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        ) from None


def percent(value: float | None) -> str:
    """0.0515 -> "5.2", for tables in percent."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
