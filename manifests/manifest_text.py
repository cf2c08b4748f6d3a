"""The text of a manifest: how it is laid out, and what no text may hold."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safeshard.manifests.bounded import MAX_TENSORS, TooLargeError, read_regular, refuse_many
from safeshard.manifests.errors import Offence, RequestError

MANIFEST_NAME = "manifest.json"
UNFINISHED = ".partial"  # what the folder of an output that is being written ends with
INLINE_CHARS = 300
MAX_MANIFEST_BYTES = 200_000_000  # of as many tensors as are taken it is some 80 MB
MAX_MANIFEST_VALUES = 6_000_000
MAX_WIDE_BYTES = 32_000_000
MAX_OPTIONS_CHARS = 1_000_000  # of the method's options
MAX_ENTRIES = 2 * MAX_TENSORS  # of one list
MAX_KEYS = 10_000  # of one table


def read_manifest(file: Path) -> bytes:
    """The text of a manifest.

    Raises:
        RequestError: it is not there, cannot be read, or is too large.
    """
    try:
        return read_regular(file, MAX_MANIFEST_BYTES)
    except TooLargeError as error:
        raise RequestError(Offence(str(file), "", "at most {} bytes".format(*error.args), str(error.args[1]))) from None
    except OSError as error:
        remedy = f"name an output folder of safeshard, with {MANIFEST_NAME} in it"
        offence = Offence(str(file), expected="a manifest", got=error.strerror or "", remedy=remedy)
        if isinstance(error, FileNotFoundError):
            offence = _unfinished(file.parent if file.name == MANIFEST_NAME else file) or offence
        raise RequestError(offence) from error


def _unfinished(output: Path) -> Offence | None:
    """An offence of an output that has no manifest yet: its files lie in a folder beside it until it has."""
    partial = output if output.name.endswith(UNFINISHED) else output.parent / f"{output.name}{UNFINISHED}"
    if not os.path.isdir(partial):  # noqa: PTH112  # Path's raises for a name that is too long
        return None
    got = "an unfinished one" + (f", {partial}" if partial != output else "")
    return Offence(str(output), "", "a finished output", got, "run its command again, which goes on from there")


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"key named twice: {', '.join(map(repr, repeated(key for key, _ in pairs)))}")
    if len(table) > MAX_KEYS:
        raise ValueError(f"a table of {len(table)} keys, more than {MAX_KEYS}")
    return table


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def reject_ambiguous(text: bytes) -> None:
    """Raise ValueError for what parsers read differently (a repeated key, NaN, infinity), and for what is too much."""
    refuse_many(text, MAX_MANIFEST_VALUES)
    if len(text) > MAX_WIDE_BYTES and (b"\\u" in text or not text.isascii()):  # such a text takes four times the memory
        raise ValueError(f"more than {MAX_WIDE_BYTES} bytes with characters beyond ASCII")
    document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    method = document.get("method") if isinstance(document, dict) else None
    if len(json.dumps(method)) > MAX_OPTIONS_CHARS:
        raise ValueError(f"method has more than {MAX_OPTIONS_CHARS} characters")
    for key, value in document.items() if isinstance(document, dict) else ():
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            raise ValueError(f"{key} has {len(value)} entries, more than {MAX_ENTRIES}")


def layout(value: Any, depth: int = 0) -> str:
    """JSON with the two outer levels broken into lines, and deeper ones only where a line would be long."""
    flat = json.dumps(value, allow_nan=False)
    if not isinstance(value, dict | list) or not value or (depth >= 2 and len(flat) <= INLINE_CHARS):
        return flat
    pad = "  " * (depth + 1)
    if isinstance(value, dict):
        brackets, items = "{}", [f"{json.dumps(key)}: {layout(item, depth + 1)}" for key, item in value.items()]
    else:
        brackets, items = "[]", [layout(item, depth + 1) for item in value]
    return f"{brackets[0]}\n" + ",\n".join(pad + item for item in items) + f"\n{pad[2:]}{brackets[1]}"
