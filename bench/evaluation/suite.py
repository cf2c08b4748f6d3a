"""A suite: what models are asked, how they answer, and how that is graded. YAML, or one of those built in by name.

    name: mine
    sampling: {temperature: 0, max_tokens: 256}
    parts:
      - name: harmful
        measures: attack_success        # or over_refusal, utility
        prompts: {file: harmful.jsonl}  # or {hub: walledai/HarmBench, ...}, {built_in: refusals}, {items: [...]}
        grader: refusal                 # or {name: guard, model: ...}
      - name: borderline
        measures: over_refusal
        prompts: {built_in: borderline}
        grader: refusal
      - name: task
        measures: utility
        prompts: {file: task.jsonl}
        grader: {name: exact, form: json}

Attack success alone says little: a model that answers nothing has none. So a suite that measures it also needs a part
of harmless prompts, the control, unless it says `control: false`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from safeshard.bench.evaluation.graders import AnyGrader
from safeshard.bench.evaluation.graders.base import Measure
from safeshard.bench.evaluation.prompts import Prompts
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.options import Finite, Folder, Options, build
from safeshard.streamer.plan.request.yaml_file import read_yaml

BUILT_IN = Path(__file__).parent / "suites"
LEAST_TEMPERATURE = 0.001  # below some 1e-38 scores overflow, long before that the draw is greedy


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", value):
        raise PydanticCustomError("name", "a name of at most 64 letters, digits, dots, hyphens and underscores")
    return value


def _temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise PydanticCustomError("temperature", f"0, which is greedy, or at least {LEAST_TEMPERATURE}")
    return value


Name = Annotated[str, AfterValidator(_name)]


class Sampling(Options):
    """How answers are drawn."""

    temperature: Annotated[Finite, AfterValidator(_temperature)] = Field(default=0.0, ge=0, description="0 is greedy")
    top_k: int | None = Field(default=None, gt=0)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=512, gt=0, description="of an answer")
    seed: int = Field(default=0, ge=0, lt=2**31)

    @property
    def label(self) -> str:
        """How it is called beside a figure."""
        if not self.temperature:
            return "greedy"
        named = {"top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        return ", ".join([f"T {self.temperature:g}", *(f"{k} {v:g}" for k, v in named.items() if v is not None)])


class Harness(Options):
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[str, ...] = Field(min_length=1)
    include_path: Folder | None = Field(None, description="folder of task files of your own")
    shots: int | None = Field(None, ge=0, description="examples before each question; default: the task's own")
    limit: int | None = Field(None, gt=0, description="take the first so many of each task")


class Part(Options):
    """One set of prompts and what it measures."""

    name: Name
    measures: Measure
    prompts: Prompts | None = None
    harness: Harness | None = None
    grader: AnyGrader | None = None
    system: str | None = Field(None, description="system prompt")
    sampling: Sampling | None = Field(None, description="in place of the suite's")

    @model_validator(mode="after")
    def _consistent(self) -> Part:
        if (self.prompts is None) == (self.harness is None):
            raise _bad(f"part {self.name} needs either prompts or harness")
        if self.harness is not None and (self.measures != "utility" or self.grader is not None):
            raise _bad(f"part {self.name}: a harness measures utility, and grades by itself")
        if self.prompts is not None and self.grader is None:
            raise _bad(f"part {self.name} needs a grader")
        if self.grader is not None and self.measures not in self.grader.measures:
            known = " or ".join(sorted(self.grader.measures))
            raise _bad(f"part {self.name}: the grader {self.grader.name} tells {known}, not {self.measures}")
        return self


class Suite(Options):
    """What models are asked, and how it is graded."""

    name: Name
    sampling: Sampling = Sampling()
    control: bool = Field(default=True, description="a part of harmless prompts is required beside attacks")
    parts: tuple[Part, ...]

    @model_validator(mode="after")
    def _whole(self) -> Suite:
        if not self.parts:
            raise _bad("a suite needs parts")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise _bad("parts need names of their own")
        measured = {part.measures for part in self.parts}
        if self.control and measured == {"attack_success"}:
            raise _bad(
                "attack success without a control says little, for a model that answers nothing has none: add a part "
                "that measures over_refusal or utility (prompts: {built_in: borderline}), or say control: false"
            )
        return self

    def sampling_of(self, part: Part) -> Sampling:
        """The part's own sampling, or the suite's."""
        return part.sampling or self.sampling


def _bad(sentence: str) -> PydanticCustomError:
    """A whole sentence, as `options.build` shows value errors."""
    return PydanticCustomError("value_error", "{sentence}", {"sentence": sentence})


def read_suite(
    source: str | Path, given: Mapping[str, str | Path] | None = None, grader_model: str | None = None
) -> Suite:
    """Read a suite from a YAML file, or a built-in one by its name.

    Args:
        given: part -> file of prompts, for parts that leave it to the user; "" stands for all of these.
        grader_model: in place of the models that its graders ask.

    Raises:
        RequestError: there is none such, it is malformed, or `given` names parts that do not ask for it; all of it.
    """
    path, where = _place(source), str(source)
    document = read_yaml(path, "a suite")
    if not isinstance(document, dict):
        raise RequestError(Offence(where, "", "a mapping with name and parts", type(document).__name__))
    if grader_model is not None:
        _set_grader_model(document, grader_model, where)
    suite = build(Suite, document, where)
    return _with_given(suite, given or {}, where)


def known_suites() -> list[str]:
    """The names of the built-in suites."""
    return sorted(file.stem for file in BUILT_IN.glob("*.yaml"))


def _place(source: str | Path) -> Path:
    if isinstance(source, str) and re.fullmatch(r"[\w-]+", source):
        if source in known_suites():
            return BUILT_IN / f"{source}.yaml"
        if not Path(source).exists():
            expected = f"a YAML file, or one of {', '.join(known_suites())}"
            raise RequestError(Offence("--suite", source, expected, "neither"))
    return Path(source)


def _set_grader_model(document: dict[str, Any], model: str, where: str) -> None:
    parts = document.get("parts")
    graders = [part.get("grader") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    asked = [g for g in graders if isinstance(g, dict) and g.get("name") in ("guard", "judge")]
    if not asked:
        raise RequestError(Offence("--grader-model", model, "a suite whose graders ask a model", where))
    for grader in asked:
        grader["model"] = model


def _with_given(suite: Suite, given: Mapping[str, str | Path], where: str) -> Suite:
    """The suite with the user's files in place of `given: true`."""
    open_parts = [part.name for part in suite.parts if part.prompts and part.prompts.given]
    offences = [
        Offence(
            "--prompts", name, f"a part of {where} that leaves its prompts to you: {', '.join(open_parts) or 'none'}"
        )
        for name in given
        if name and name not in open_parts
    ]
    if "" in given and not open_parts:
        offences.append(Offence("--prompts", str(given[""]), "a suite that leaves prompts to you", where))
    offences += [
        Offence(where, f"part {name}", "a file of prompts", "none", f"--prompts {name}=FILE")
        for name in open_parts
        if name not in given and "" not in given
    ]
    if offences:
        raise RequestError(offences)
    parts = []
    for part in suite.parts:
        if part.prompts is not None and part.prompts.given:
            file = Path(given.get(part.name, given.get("", "")))
            prompts = part.prompts.model_copy(update={"given": False, "file": file})
            part = part.model_copy(update={"prompts": prompts})
        parts.append(part)
    return suite.model_copy(update={"parts": tuple(parts)})
