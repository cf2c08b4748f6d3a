"""A sweep: one fine-tuned model, methods with the settings to try, and the suite that judges them.

    aligned: org/model-chat
    adapter: ./alice                     # or finetuned
    suite: mine.yaml                     # or a built-in one
    validation: 0.5                      # share of each part's prompts; or another suite: {suite: other.yaml}
    margin: 2                            # points of attack success beyond the aligned model's that are allowed
    defaults: {unaligned: org/model, calibration: safe.jsonl}     # options of every method that takes them
    settings:
      - method: safedelta
        matrix: {strength: [0.1, 1, 3, 10]}
      - method: safedelta
        label: Safe Delta, by row        # in tables and in the picture; default: the method's name
        selection: row
        matrix: {strength: [3, 10]}
    output: tuned/alice

`scale`, the baseline, is tried at the factors 0.2, 0.3, 0.4, 0.5, 0.6 and 0.8 unless the sweep names its own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from safeshard.bench.evaluation.engines.open import Kind
from safeshard.bench.evaluation.prompts import Prompt
from safeshard.bench.tune.rule import MARGIN
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import Finite, Folder, Options, Place, build
from safeshard.streamer.plan.request.jobs_file import jobs_of
from safeshard.streamer.plan.request.yaml_file import read_yaml

FACTORS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
SETTINGS = "settings"  # the folder of the outputs to choose from
_OF_THE_SWEEP = {"aligned", "adapter", "finetuned", "output", "push"}  # else settings could not be compared


class Other(Options):
    """A suite of its own for validation."""

    suite: Place


class Sweep(Options):
    """What to try, and how it is judged."""

    aligned: Place
    adapter: Place | None = None
    finetuned: Place | None = None
    suite: Place
    prompts: dict[str, Place] = Field(default={}, description="files of parts that leave their prompts to you")
    grader_model: str | None = None
    validation: Finite | Other = Field(default=0.5, description="share of prompts, or {suite: another}")
    margin: Finite = Field(default=MARGIN, ge=0, le=100)
    defaults: dict[str, Any] = Field(default={}, description="options of every method that takes them")
    settings: tuple[dict[str, Any], ...] = ()
    output: Folder
    engine: Kind = "transformers"
    batch_size: int = Field(default=16, gt=0)

    @field_validator("validation", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if not isinstance(value, dict | Other) and not (isinstance(value, int | float) and math.isfinite(value)):
            raise PydanticCustomError("share", "a share between 0 and 1, or {suite: another}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Sweep:
        if (self.adapter is None) == (self.finetuned is None):
            raise _bad("give either adapter or finetuned")
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise _bad("validation is a share between 0 and 1, or {suite: another}")
        if not self.settings:
            raise _bad("give settings to try")
        return self

    @property
    def tuned(self) -> str:
        """The fine-tuned model."""
        return str(self.adapter or self.finetuned)


def _bad(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{sentence}", {"sentence": sentence})


@dataclass(frozen=True)
class Setting:
    """One job of a sweep, as tables call it, and its folder under `settings`."""

    method: str
    setting: str
    folder: str
    entry: Mapping[str, Any]  # of a jobs file


def read_sweep(path: Path) -> Sweep:
    """Read a sweep.

    Raises:
        RequestError: it is malformed; all offences.
    """
    document = read_yaml(path, "a sweep")
    if not isinstance(document, dict):
        raise RequestError(Offence(str(path), "", "a mapping with aligned, suite, settings", type(document).__name__))
    return build(Sweep, document, str(path))


def settings_of(sweep: Sweep) -> tuple[list[Setting], list[Job]]:
    """Every setting, `scale` among them, and its validated job.

    Raises:
        RequestError: jobs are malformed, all of them; two settings are the same.
    """
    entries = [(f"settings: entry {number}", entry) for number, entry in enumerate(sweep.settings, 1)]
    if not any(entry.get("method") == "scale" and "label" not in entry for _, entry in entries):
        entries.insert(0, ("settings: scale", {"method": "scale", "matrix": {"factor": list(FACTORS)}}))
    expanded = [(name, setting) for name, entry in entries for setting in _expand(sweep, name, entry)]
    called, found = [name for name, _ in expanded], [setting for _, setting in expanded]
    jobs = jobs_of({"defaults": _defaults(sweep), "jobs": [dict(s.entry) for s in found]}, "the sweep", called)
    folders = [setting.folder for setting in found]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise RequestError(
            [Offence("settings", f, "each setting once", "twice", "give a label") for f in sorted(twice)]
        )
    return found, jobs


def _defaults(sweep: Sweep) -> dict[str, Any]:
    tuned = {"adapter": sweep.adapter} if sweep.adapter is not None else {"finetuned": sweep.finetuned}
    return {**sweep.defaults, "aligned": sweep.aligned, **tuned}


def _expand(sweep: Sweep, name: str, entry: Mapping[str, Any]) -> Iterator[Setting]:
    matrix = entry.get("matrix", {})
    method, label = str(entry.get("method")), str(entry.get("label", entry.get("method")))
    if common := sorted(_OF_THE_SWEEP & {*entry, *(matrix if isinstance(matrix, dict) else ())}):
        raise RequestError([Offence(name, key, "an option of the method", "one of the whole sweep") for key in common])
    own = {key: value for key, value in entry.items() if key not in ("matrix", "label")}
    if not isinstance(matrix, dict) or not all(isinstance(values, list) and values for values in matrix.values()):
        raise RequestError(Offence(name, method, "matrix: lists of values by option", repr(matrix)[:80]))
    for values in itertools.product(*matrix.values()):
        options = dict(zip(matrix, values, strict=True))
        setting = ", ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in options.items()) or "as given"
        folder = re.sub(r"[^\w.-]+", "-", f"{label} {setting}").strip("-.")
        yield Setting(label, setting, folder, own | options | {"output": str(sweep.output / SETTINGS / folder)})


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def split(prompts: Mapping[str, Sequence[Prompt]], share: float) -> tuple[dict[str, list[Prompt]], ...]:
    """Validation and test prompts of every part: by a hash of each, so that their order in a file does not matter.

    Raises:
        RequestError: a part has too few prompts for both.
    """
    validation, test, offences = {}, {}, []
    for part, found in prompts.items():
        ranked = sorted(found, key=lambda prompt: hashlib.sha256(repr(prompt.messages).encode()).digest())
        count = round(share * len(ranked))
        if not 0 < count < len(ranked):
            offences.append(Offence(part, "prompts", "enough for validation and test", str(len(ranked))))
        validation[part], test[part] = ranked[:count], ranked[count:]
    if offences:
        raise RequestError(offences)
    return validation, test
