"""YAML files of users: no aliases, no repeated keys, bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from safeshard.manifests.bounded import TooLargeError, read_regular
from safeshard.manifests.errors import Offence, RequestError

MAX_BYTES = 4_000_000
MAX_NODES = 120_000  # the parser takes some 30 us for each; 10,000 jobs with five options have 110,000
MAX_NUMBER_CHARS = 40


def read_yaml(path: Path, what: str) -> Any:
    """The document of a YAML file, `what` it is in messages.

    Raises:
        RequestError: it cannot be read, is too large, or is not valid.
    """
    try:
        return yaml.load(read_regular(path, MAX_BYTES), Loader=_Loader)  # a SafeLoader
    except TooLargeError as error:
        raise RequestError(Offence(str(path), "", f"at most {MAX_BYTES} bytes", str(error.args[1]))) from None
    except OSError as error:
        raise RequestError(Offence(str(path), "", what, error.strerror or "unreadable")) from None
    except Exception as error:  # the constructors of YAML's own tags raise KeyError, IndexError, AttributeError, ...
        raise RequestError(_invalid(str(path), error)) from None


def _invalid(where: str, error: Exception) -> Offence:
    """An offence of a text that is no YAML: at which line and column, where the parser says it."""
    if isinstance(error, yaml.reader.ReaderError):
        return Offence(
            where, "", "valid YAML", f"at character {error.position + 1}: {error.reason}", "save it as UTF-8"
        )
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = [getattr(error, name, None) for name in ("problem", "context")]
    got = ", ".join(" ".join(str(text).split()) for text in said if text) or " ".join(str(error).split())
    if mark is None:
        return Offence(where, "", "valid YAML", got[:300])
    remedy = "indent with spaces" if "'\\t'" in got else "correct it there"
    return Offence(f"{where}, line {mark.line + 1}, column {mark.column + 1}", "", "valid YAML", got[:300], remedy)


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (they can blow a small file up), with unique keys and bounded numbers and nodes."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_NODES} values", None)
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[str] = set()
        for key, (position, _) in zip(keys, node.value, strict=True):
            if not isinstance(key, str) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is repeated or no name", position.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(kind: str) -> Callable[[_Loader, Any], Any]:
    """A constructor of numbers that leaves those of a thousand digits alone: `1:1:1...` takes for ever to compute."""

    def construct(loader: _Loader, node: Any) -> Any:
        if len(node.value) > MAX_NUMBER_CHARS:
            problem = f"a number of {len(node.value)} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return getattr(loader, f"construct_yaml_{kind}")(node)

    return construct


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number(_kind))
