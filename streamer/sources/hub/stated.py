"""What the Hub states of a file, and its hashes."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass

HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class Stated:
    """A file of a commit as the Hub states it. `sha256` is that of a file in large storage, `blob_id` git's SHA-1."""

    path: str  # in the repository
    size: int
    blob_id: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """The name of its blob in the Hub's cache."""
        return self.sha256 or self.blob_id

    def hasher(self) -> hashlib._Hash:
        """A hash under way, whose hexdigest is to be `etag`."""
        return hashlib.sha256() if self.sha256 else git_hasher(self.size)

    def holds(self, data: bytes) -> bool:
        """Whether `data` is the file's content. A Hub that states no hash is believed."""
        hasher = self.hasher()
        hasher.update(data)
        return len(data) == self.size and (not self.etag or hasher.hexdigest() == self.etag)


def git_hasher(size: int) -> hashlib._Hash:
    """git's hash of a file of `size` bytes, under way."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def hash_open_file(fd: int, hasher: hashlib._Hash, stopped: threading.Event, size: int) -> None:
    """Add the first `size` bytes of a file to a hash; ends early where it is stopped."""
    buffer, position = bytearray(HASH_CHUNK), 0
    while position < size and not stopped.is_set():
        count = os.preadv(fd, [memoryview(buffer)[: size - position]], position)
        if count == 0:
            break
        hasher.update(memoryview(buffer)[:count])
        position += count
