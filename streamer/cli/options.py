"""The options of the command line, made from the fields of pydantic models: name, type, help and default."""

from __future__ import annotations

import inspect as introspection
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from safeshard.streamer.cli.command import PATH, PLACE
from safeshard.streamer.options import Options, Output, Place, Repository, fields_of


def takes(
    *models: type[Options], many: frozenset[str] = frozenset(), without: frozenset[str] = frozenset()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function the fields of `models` as options, before its own; `many` may repeat."""

    def with_options(function: Callable[..., None]) -> Callable[..., None]:
        fields = {name: field for name, field in fields_of(*models).items() if name not in without}
        parameters = [_parameter(name, field, name in many) for name, field in fields.items()]
        hints = get_type_hints(function, include_extras=True)
        own = introspection.signature(function).parameters.values()
        kept = [p.replace(annotation=hints[p.name]) for p in own if p.kind is not p.VAR_KEYWORD]
        signature = introspection.Signature(sorted([*parameters, *kept], key=lambda p: p.kind))
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return function

    return with_options


def _parameter(name: str, field: FieldInfo, many: bool) -> introspection.Parameter:
    """One command-line option from a model's field. Its default stays with the model: not given is None."""
    kind = _plain_type(field.annotation)
    is_plain = field.is_required() or field.default is None or isinstance(field.default, bool)
    shown = "" if is_plain else f" (default: {_shown(field.default)})"
    required = " (required)" if field.is_required() else ""
    flag = f"--{name.replace('_', '-')}"
    if field.default is True:
        flag += f"/--no-{name.replace('_', '-')}"
    text = (field.description or "") + shown + required
    metavar = PLACE if _is_place(field) else PATH if kind is Path else None
    option = typer.Option(flag, help=text, metavar=metavar, show_default=False)
    annotation = Annotated[list[kind] | None if many else kind | None, option]  # type: ignore[valid-type]
    default = field.default if kind is bool else None
    if kind is bool:
        annotation = Annotated[bool, option]
    return introspection.Parameter(name, introspection.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_place(field: FieldInfo) -> bool:
    """Whether a field's type is a place's, or that and None: pydantic keeps what marks it in two places."""
    return any(
        get_args(each)[-1] in field.metadata or each in get_args(field.annotation)
        for each in (Place, Output, Repository)
    )


def _plain_type(annotation: Any) -> Any:
    """The type that the command line reads: without None and constraints; sizes are read by the model."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, type(int | None)):
        return _plain_type(next(a for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is tuple:
        return tuple[tuple(_plain_type(a) for a in get_args(annotation))]  # type: ignore[misc]
    known = (int, float, bool, Path)
    return annotation if annotation in known or get_origin(annotation) is Literal else str


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return value.human_readable() if hasattr(value, "human_readable") else str(value)
