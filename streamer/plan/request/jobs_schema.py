"""The JSON Schema of a jobs file, for editors: what each method takes, made from the options themselves.

It is exported as `jobs.schema.json` beside this file. A first line in a jobs file has editors check it as it is typed:

    # yaml-language-server: $schema=jobs.schema.json
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeshard.streamer.methods import METHODS

SCHEMA = "safeshard.jobs/1"
NOTHING = {"type": "null"}  # takes a default away


def jobs_schema() -> dict[str, Any]:
    """The schema: `defaults` for every method, and jobs by their `method`.

    It is as strict as can be said about one entry alone: `read_jobs` also sees what defaults and a matrix make of it.
    """
    definitions: dict[str, Any] = {}
    options: dict[str, list[Any]] = {}
    for method, job in METHODS.items():
        schema = job.model_json_schema(by_alias=True)
        definitions |= schema.get("$defs", {})
        fields = {name: _described(field) for name, field in schema["properties"].items()}
        for name, field in fields.items():
            options.setdefault(name, []).append(field)
        definitions[method] = _entry(method, fields)
    entries = [{"$ref": f"#/$defs/{method}"} for method in METHODS]
    defaults = {name: _any_of(found) for name, found in sorted(options.items())}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA,
        "title": "Jobs of safeshard batch",
        "type": "object",
        "properties": {
            "defaults": {"description": "options of every job that takes them", **_object(defaults)},
            "jobs": {"type": "array", "minItems": 1, "items": {"required": ["method"], "oneOf": entries}},
        },
        "required": ["jobs"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _entry(method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: {"$ref": f"#/$defs/{method}/properties/{name}"} for name in fields}
    matrix = {name: {"type": "array", "minItems": 1, "items": value} for name, value in values.items()}
    shown = {"description": "one job for each combination of these options' values", **_object(matrix)}
    given = {name: _or_nothing(field) for name, field in fields.items()}
    paper = {"description": METHODS[method].paper}
    return {**paper, **_object({"method": {"const": method}, "matrix": shown, **given}), "required": ["method"]}


def _or_nothing(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field that may be null too."""
    if NOTHING in field.get("anyOf", ()):
        return dict(field)
    words = _words(field)
    return {"anyOf": [{k: v for k, v in field.items() if k not in words}, NOTHING], **words}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _described(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field without what pydantic adds for forms; tuples may come as text too, as on the command line."""
    kept = {key: value for key, value in field.items() if key not in ("title", "format")}
    if kept.get("type") == "array":
        words = _words(kept)
        kept = {"anyOf": [{k: v for k, v in kept.items() if k not in words}, {"type": "string"}], **words}
    return kept


def _words(field: Mapping[str, Any]) -> dict[str, Any]:
    return {key: field[key] for key in ("description", "default") if key in field}


def _any_of(found: list[Any]) -> dict[str, Any]:
    """What any method takes under one name."""
    different = [_or_nothing(field) for n, field in enumerate(found) if field not in found[:n]]
    return different[0] if len(different) == 1 else {"anyOf": different}
