"""Write streamer/api.pyi: the public functions with the keywords, types and defaults that their options have.

`python tests/stubs.py` writes it; a test holds it against the options.
"""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ByteSize

from safeshard.streamer import api
from safeshard.streamer.options import RunOptions

STUB = Path(__file__).parent.parent / "streamer/api.pyi"
HEAD = '''"""The public functions: the commands, callable. Made by tests/stubs.py from the options; do not edit."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

from safeshard.manifests.verify import Finding
from safeshard.streamer.run.factors.save_factors import Factors
from safeshard.streamer.run.result import Result

'''
PLACE = "str | PathLike[str]"


def text() -> str:
    """The stub file, formatted."""
    functions = "\n".join(_function(name) for name in api.__all__)
    ruff = [Path(sys.executable).with_name("ruff"), "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(ruff, input=HEAD + functions, capture_output=True, text=True, check=True).stdout


def _function(name: str) -> str:
    function = getattr(api, name)
    given = signature(function)
    shown = [_parameter(p) for p in given.parameters.values()]
    first = next((n for n, p in enumerate(given.parameters.values()) if p.kind is Parameter.KEYWORD_ONLY), None)
    if first is not None:
        shown.insert(first, "*")
    doc = "\n    ".join((getdoc(function) or "").splitlines()).replace("\n    \n", "\n\n")
    end = "\n    " if "\n" in doc else ""
    return f'def {name}({", ".join(shown)},) -> {_text(given)}:\n    """{doc}{end}"""\n'


def _text(given: Signature) -> str:
    return str(given.return_annotation)


def _parameter(parameter: Parameter) -> str:
    annotation = parameter.annotation
    shown = annotation.replace("os.PathLike", "PathLike") if isinstance(annotation, str) else _type(annotation)
    is_option = not isinstance(annotation, str)
    texts = ("str", "str | None", "Path", "str | Path")
    if is_option and shown in texts and parameter.name not in RunOptions.model_fields:
        shown = PLACE + " | None" * shown.endswith("None")  # texts among a job's options are places
    if parameter.default is Parameter.empty:
        return f"{parameter.name}: {shown}"
    if parameter.default is None and "None" not in shown:  # what the options make of it is not
        shown += " | None"
    default = "..." if callable(parameter.default) else repr(parameter.default)
    return f"{parameter.name}: {shown} = {default}"


def _type(annotation: Any) -> str:
    """A type as callers may give it: a path as text, a size as `2GiB`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(_type(each) for each in arguments)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is tuple:
        return f"tuple[{', '.join(map(_type, arguments))}]"
    if annotation is ByteSize:
        return "int | str"
    return "None" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


if __name__ == "__main__":
    assert os.access(STUB.parent, os.W_OK)
    STUB.write_text(text())
