"""Folders in memory, and the limits within which a reader has to come to its end."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from safeshard.streamer.inputs.names import patterns

SECONDS, BYTES = 60, 1 << 30  # hundreds of times what any reader takes; what explodes passes them all the same


class OutOfBounds(BaseException):
    """Not an Exception: the readers catch those of the libraries they call."""


class Folder:
    """A source whose files are bytes in memory."""

    revision, far = None, False

    def __init__(self, files: dict[str, bytes], spec: str = "folder") -> None:
        self.files, self.spec, self.identity = files, spec, spec

    def sizes(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(self.files[name])
        return self.files[name][start:stop]

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        view[:] = self.read(name, offset, offset + len(view))

    def local_path(self, name: str) -> Path | None:
        return None


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfBounds(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    except MemoryError as error:
        raise OutOfBounds(f"more than {BYTES} bytes") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="session")
def folder() -> type[Folder]:
    return Folder


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """Inside, more than a minute or a GiB of new memory is a failure; patterns have two seconds, not thirty."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 2.0)
    return _bounded
