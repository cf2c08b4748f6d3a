"""What every place to write to afar is, and how a refusal to write there reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from safeshard.streamer.sources.remote import EXPIRED, UNDERWAY, Final, Line, status_of, told

T = TypeVar("T")
REMEDIES = {  # by status, where writing wants something else than reading
    401: "log in: `hf auth login` or HF_TOKEN for the Hub, the cloud's own credentials for a bucket",
    403: "use credentials that may write there, then run the same command again",
    404: "check the name: a bucket is not made, it has to be there",
    501: "this store has no conditional writes (If-None-Match), which keep two runs apart: use another",
}


@dataclass(frozen=True)
class Stored:
    """A file as a store has it: its size, and what changes when it does."""

    size: int
    e_tag: str | None = None
    version: str | None = None

    def is_as(self, other: Stored) -> bool:
        """Whether two looks at a name saw one content, as far as the store tells."""
        tags = [tag.strip('"') for tag in (self.e_tag, other.e_tag) if tag]
        return self.size == other.size and len(set(tags)) < 2


class ConflictError(Final):
    """Another writer was there first."""


class Store(Protocol):
    """A flat folder afar. What fails for good raises `RunError`."""

    spec: str

    def names(self) -> dict[str, Stored]:
        """All that lies there, subfolders too; empty where there is nothing."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""

    def stop(self) -> None:
        """Give up what is under way, for another thread."""


def patiently(line: Line, where: str, request: Callable[[], T], tries: int = UNDERWAY) -> T:
    """The answer of a request that writes, or looks before it does.

    Raises:
        RunError: it failed for good.
    """
    try:
        return line.call(where, request, tries)
    except Final as error:
        cause = error.__cause__
        if cause is None:
            raise
        expired = EXPIRED if "expired" in str(cause).lower() else None
        remedy = told(str(cause)) or expired or REMEDIES.get(status_of(cause) or 0)
        if remedy is None:
            raise
        raise Final(error.message, remedy) from cause
