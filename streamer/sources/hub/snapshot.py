"""A snapshot in the Hub's cache as a source: for work offline."""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import Checked, reason
from safeshard.streamer.sources.hub.stated import git_hasher, hash_open_file
from safeshard.streamer.sources.local import LocalSource
from safeshard.streamer.sources.remote import Stopped


class Snapshot(LocalSource):
    """A snapshot in the Hub's cache. A file is hashed before its content is used: its blob's name states the hash."""

    def __init__(self, folder: Path, spec: str, revision: str | None) -> None:
        super().__init__(folder, spec, revision)
        self.stopped = threading.Event()
        self._checks: dict[str, threading.Lock] = {name: threading.Lock() for name in self._sizes}
        self._sound: set[str] = set()

    def stop(self) -> None:
        self.stopped.set()

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        self.check(name)
        super().readinto(name, offset, view)

    def readinto_room(self, name: str, offset: int, nbytes: int, room: memoryview) -> int:
        self.check(name)
        return super().readinto_room(name, offset, nbytes, room)

    def read(self, name: str, start: int, stop: int) -> bytes:
        if not name.endswith(".safetensors"):
            self.check(name)
        buffer = bytearray(stop - start)
        super().readinto(name, start, memoryview(buffer))  # of a shard a header, or samples
        return bytes(buffer)

    def local_path(self, name: str) -> Path:
        self.check(name)
        return self._path(name)

    def checked(self, name: str) -> Checked | None:
        return "hash" if name in self._sound else None

    def check(self, name: str) -> None:
        """Hash a file once.

        Raises:
            RunError: its content is not what the Hub states, or it cannot be read.
        """
        if name in self._sound or name not in self._checks:
            return
        path = self._path(name)
        with self._checks[name]:
            if name in self._sound or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", path.name):
                return
            size = self._sizes[name]
            hasher = hashlib.sha256() if len(path.name) == 64 else git_hasher(size)
            try:
                hash_open_file(self._open(name), hasher, self.stopped, size)
            except OSError as error:
                raise RunError(f"{path}: reading failed: {reason(error)}", "check the disk, then run again") from error
            if self.stopped.is_set():
                raise Stopped(f"{self.spec}/{name}")
            if hasher.hexdigest() != path.name:
                problem = f"{self.spec}/{name}: the copy in the cache is damaged: {path} is not what the Hub states"
                raise RunError(problem, f"remove {path}, and run again online")
            self._sound.add(name)
