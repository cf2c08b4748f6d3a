"""The jobs file of `batch`: YAML, with defaults and a matrix.

    defaults:                     # options of every job
      aligned: ./llama-chat
      unaligned: ./llama
      safe_adapter: ./safe
    jobs:
      - method: safemerge
        matrix:                   # one job for each combination
          adapter: [./alice, ./bob]
          threshold: [0.3, 0.35]
        output: out/{adapter}-{threshold}
      - method: safelora
        adapter: ./alice
        num_layers: 8
        safe_adapter: null        # takes a default away
        output: out/alice-lora

`{option}` in `output` and `push` stands for that option's value, of a path its last part. An `adapter` or `finetuned`
with wildcards in its last part (`./adapters/*`, `s3://bucket/adapters/*`, `hf://org/team-*`) stands for every folder or
repository that matches: one job for each. Relative paths start at the current directory. Unknown keys are errors.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from safeshard.manifests.errors import Offence, RequestError, without_secrets
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import build
from safeshard.streamer.plan.request.yaml_file import read_yaml
from safeshard.streamer.sources import is_pattern, matching

MAX_JOBS = 10_000
GLOBBED = ("adapter", "finetuned")


def read_jobs(path: Path) -> list[Job]:
    """Read and validate all jobs.

    Raises:
        RequestError: the file is malformed, or jobs are; every offence of every job.
    """
    return jobs_of(read_yaml(path, "a jobs file"), str(path))


def jobs_of(document: Any, where: str, called: Sequence[str] = ()) -> list[Job]:
    """Validate the jobs of a document that was read, called `where` in messages.

    `called` names each job in messages, where its number is not one that anybody wrote.

    Raises:
        RequestError: it is malformed, or jobs are; every offence of every job.
    """
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list) or not document["jobs"]:
        raise RequestError(Offence(where, "jobs", "a list of jobs", "none", "see the documentation of batch"))
    offences = [
        Offence(where, str(key), "defaults and jobs", "an unknown key")
        for key in document.keys() - {"defaults", "jobs"}
    ]
    defaults = document.get("defaults") or {}
    if not isinstance(defaults, dict):
        offences.append(Offence(where, "defaults", "a mapping of options", type(defaults).__name__))
        defaults = {}
    offences += [
        Offence(where, f"defaults.{key}", "an option of some method", "an unknown one", "check the spelling")
        for key in defaults
        if not _is_known(key)
    ]
    jobs: list[Job] = []
    for number, entry in enumerate(document["jobs"], 1):
        try:
            jobs += _jobs(called[number - 1] if called else f"{where}: job {number}", defaults, entry)
        except RequestError as error:
            offences += error.offences
        if len(jobs) > MAX_JOBS:
            raise RequestError(_too_many(f"{where}: job {number}"))
    if offences:  # so no plan is made, which would tell whether jobs share an output
        from safeshard.streamer.plan.written.own_place import shared_offences  # with torch, needless else

        raise RequestError(list(dict.fromkeys([*offences, *shared_offences(jobs)])))
    return jobs


def _is_known(key: Any) -> bool:
    return any(key in job.model_fields for job in METHODS.values())


def _jobs(where: str, defaults: Mapping[str, Any], entry: Any) -> Iterator[Job]:
    if not isinstance(entry, dict):
        raise RequestError(Offence(where, "", "a mapping of options", type(entry).__name__))
    method, matrix = entry.get("method"), entry.get("matrix", {})
    if not isinstance(method, str) or method not in METHODS:
        wrong = [Offence(where, "method", " or ".join(METHODS), repr(method))]
        wrong += [
            Offence(where, str(key), "an option of some method", "an unknown one", "check the spelling")
            for key in entry
            if key not in ("method", "matrix") and not _is_known(key)
        ]
        raise RequestError(wrong)
    if not isinstance(matrix, dict) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise RequestError(Offence(where, "matrix", "lists of values by option", repr(matrix)[:80]))
    matrix = _expanded({**defaults, **entry, **matrix}, matrix)
    if math.prod(map(len, matrix.values())) > MAX_JOBS:
        raise RequestError(_too_many(where))
    known = METHODS[method].model_fields.keys()
    usable = {key: value for key, value in defaults.items() if key in known}  # a default may be for other methods
    own = {key: value for key, value in entry.items() if key not in ("method", "matrix")}
    offences: list[Offence] = []
    for values in itertools.product(*matrix.values()):
        options = usable | own | dict(zip(matrix, values, strict=True))
        try:
            places = {key: _fill(where, options, key) for key in ("output", "push")}
            yield build(METHODS[method], options | places, where)
        except RequestError as error:
            offences += error.offences
    if offences:
        raise RequestError(list(dict.fromkeys(offences)))  # combinations mostly share theirs


def _too_many(where: str) -> Offence:
    return Offence(where, "matrix", f"at most {MAX_JOBS} jobs", "more", "split the file")


def _expanded(options: Mapping[str, Any], matrix: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """A matrix with every place that a pattern matches."""
    found = dict(matrix)
    for key in GLOBBED:
        given = options.get(key)
        values = given if isinstance(given, list) else [given]
        if any(isinstance(value, str) and is_pattern(value) for value in values):
            places = [matching(v) if isinstance(v, str) and is_pattern(v) else [v] for v in values]
            found[key] = list(dict.fromkeys(place for each in places for place in each))
    return found


def _fill(where: str, options: Mapping[str, Any], key: str) -> str | None:
    template = options.get(key)
    if not isinstance(template, str):
        return template

    def value(match: re.Match[str]) -> str:
        if match[1] not in options:
            raise RequestError(Offence(where, key, "{option} of an option that the job has", match[0]))
        name = PurePath(without_secrets(str(options[match[1]]))).name
        if not name.strip("."):
            expected = "a value with a name to put into the path"
            raise RequestError(Offence(where, key, expected, f"{match[0]} = {options[match[1]]!r}"))
        return name

    return re.sub(r"\{(\w+)\}", value, template)
