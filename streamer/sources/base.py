"""What every source is, and how their errors read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from safeshard.manifests.bounded import refuse_many
from safeshard.manifests.errors import Offence, RequestError, RunError, without_secrets

MAX_JSON_DEPTH = 64
MAX_JSON_BYTES = 64_000_000  # the index of a checkpoint with as many tensors as are taken is some 30 MB
FAR_READERS = 16  # of things that each take a round trip

Checked = Literal["hash", "ranges"]
Transfer = Literal["none", "ranges", "whole"]
_S3_ANSWER = re.compile(r"non-2xx (status code: \d{3}[^:]*):.*?<Code>(\w+)</Code>", re.DOTALL)
T = TypeVar("T")
S = TypeVar("S")


class Source(Protocol):
    """A read-only folder of files.

    `spec` is what the user wrote, without secrets; `identity` is equal for equal places. `far` says that a read takes a
    round trip, so that many belong under way at once. What fails after the source was opened raises `RunError`; a name
    that is not listed raises `RequestError`.
    """

    spec: str
    identity: str
    revision: str | None
    far: bool

    def sizes(self) -> dict[str, int]:
        """Names and sizes (bytes) of the files, without their contents. Subfolders are left out."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file: for headers and small files."""

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on. Safe to call from several threads."""

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        """Say that bytes are about to be read, where the system can read them ahead."""

    def local_path(self, name: str) -> Path | None:
        """A local path that holds the whole file; None where it can only be read through the source."""

    def changed(self) -> set[str]:
        """The files that are no longer what they were when the source was opened, as far as can be told."""

    def checked(self, name: str) -> Checked | None:
        """How what was read of a file was held against what its place states of it; None where it states nothing.

        "hash": the whole file was hashed. "ranges": ranges were read, each answer held against its size and ETag.
        """

    def transfer(self, name: str) -> Transfer:
        """What reading of a file fetches from afar."""

    def keeps(self, name: str) -> bool:
        """Whether reading of a file leaves it in a cache."""

    def stop(self) -> None:
        """Give up every read under way and to come: they raise. For another thread, once the run has failed."""


class Stops(Protocol):
    """A place whose requests can be given up."""

    def stop(self) -> None:
        """Give up every request under way and to come: they raise. For another thread."""


def in_parallel(source: Source, work: Callable[[S], T], items: Iterable[S]) -> Iterable[T]:
    """`work` of each item, in order; side by side where each takes a round trip."""
    return side_by_side(work, items, [source]) if source.far else map(work, items)


def side_by_side(work: Callable[[S], T], items: Iterable[S], places: Iterable[Stops]) -> list[T]:
    """`work` of each item, in order, several at a time; at a signal all requests to `places` are given up."""
    with ThreadPoolExecutor(FAR_READERS, "far") as pool:
        try:
            return list(pool.map(work, items))
        except Exception:
            raise
        except BaseException:  # a signal: the pool's end waits for what is under way, which may be stalled
            for place in places:
                place.stop()
            raise


def read_json(source: Source, name: str) -> Any:
    """Parse a small JSON file of a source.

    Raises:
        RequestError: it is too large, not JSON, nested too deep to write it again, or names a key twice.
    """
    size = source.sizes()[name]
    if size > MAX_JSON_BYTES:
        raise refuse(f"{source.spec}/{name}", f"at most {MAX_JSON_BYTES} bytes", f"{size} bytes", "check the file")
    try:
        data = source.read(name, 0, size)
        refuse_many(data)
        value = json.loads(data, object_pairs_hook=_unique)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # escapes can smuggle in lone surrogates
        return value
    except (ValueError, RecursionError) as error:
        raise refuse(f"{source.spec}/{name}", "valid JSON", reason(error), "check the file") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):  # parsers differ in which of the two they take
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return table


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        children = (child for v in level for child in (v.values() if isinstance(v, dict) else v))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")


def refuse(where: str, expected: str, got: str, remedy: str) -> RequestError:
    """The refusal of a place or of a file in it."""
    return RequestError(Offence(without_secrets(where), "", expected, without_secrets(got), remedy))


def require(source: Source, name: str) -> None:
    """Refuse a name that is not listed."""
    if name not in source.sizes():
        raise refuse(f"{source.spec}/{name}", "a file that is listed there", "no such file", "check the index")


def short(where: str, end: int, expected: int) -> RunError:
    """The error of a file that ends before the byte `expected`."""
    problem = f"{where} has nothing at byte {end} of {expected} expected: it is truncated, or changed while it was read"
    return RunError(problem, "restore the file, then run again")


def reason(error: BaseException) -> str:
    """An exception of a library in one line."""
    if isinstance(error, RunError):
        return error.message
    text = str(error).partition("\n\nDebug source")[0]  # obstore's
    if match := _S3_ANSWER.search(text):
        text = f"{match[1]} ({match[2]})"
    words = without_secrets(getattr(error, "strerror", None) or " ".join(text.split()))
    named = words if getattr(error, "speaks", False) else f"{type(error).__name__}: {words}"  # ours say enough
    return named if words else type(error).__name__
