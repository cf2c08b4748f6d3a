"""A local folder as a source."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import Checked, Transfer, reason, refuse, short
from safeshard.streamer.sources.direct import LEAST, open_direct, read_around, read_aside


class LocalSource:
    """A local folder, read with positional reads so that a truncated file is an error and not a signal.

    Attributes:
        direct: whether large reads go past the page cache, where the file system can.
    """

    far = False
    direct = False

    def __init__(self, folder: Path, spec: str, revision: str | None = None) -> None:
        self.folder, self.spec, self.revision = folder.resolve(), spec, revision
        self.identity = str(self.folder)
        self._files: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        self._lock = threading.Lock()
        try:
            self._stamps = {p.name: _stamp(p) for p in sorted(self.folder.iterdir()) if p.is_file()}
        except OSError as error:
            raise refuse(spec, "a folder that can be listed", reason(error), "check its permissions") from error
        self._sizes = {name: stamp[0] for name, stamp in self._stamps.items()}

    def changed(self) -> set[str]:
        return {name for name, stamp in self._stamps.items() if _stamp(self.folder / name) != stamp}

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def checked(self, name: str) -> Checked | None:
        return None  # a folder states no hashes

    def transfer(self, name: str) -> Transfer:
        return "none"

    def keeps(self, name: str) -> bool:
        return False

    def stop(self) -> None:
        pass  # no read takes long

    def local_path(self, name: str) -> Path:
        return self._path(name)

    def _path(self, name: str) -> Path:
        where, path = f"{self.spec}/{name}", (self.folder / name).resolve()
        if name not in self._sizes or not any(path.is_relative_to(folder) for folder in self._allowed()):
            raise refuse(where, "a file inside the folder", str(path), "copy the file into the folder")
        if not path.is_file():  # a pipe in its place would block
            raise RunError(f"{where} is gone", "restore the file, then run again")
        return path

    def _allowed(self) -> list[Path]:
        """The folder itself; in the Hub's cache, where snapshots/<commit>/<file> are links, also both of its stores."""
        repo = next((p.parent for p in self.folder.parents if p.name == "snapshots"), None)
        if repo is None:
            return [self.folder]
        return [self.folder, repo / "blobs", repo.parent / "blobs"]

    def read(self, name: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.readinto(name, start, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        with self._said(name):
            fd = self._open_direct(name) if self.direct and len(view) >= LEAST else None
            done = 0 if fd is None else read_aside(fd, offset, view)
            self._through_cache(name, offset + done, view[done:])

    def readinto_room(self, name: str, offset: int, nbytes: int, room: memoryview) -> int:
        """As `into_room`."""
        with self._said(name):
            fd = self._open_direct(name) if self.direct and nbytes >= LEAST else None
            head, done = (0, 0) if fd is None else read_around(fd, offset, nbytes, room)
            self._through_cache(name, offset + done, room[head + done : head + nbytes])
        return head

    def _through_cache(self, name: str, offset: int, view: memoryview) -> None:
        position, file = 0, self._open(name)
        while position < len(view):
            count = os.preadv(file, [view[position:]], offset + position)
            if count == 0:
                raise short(f"{self.spec}/{name}", offset + position, offset + len(view))
            position += count

    def takes_direct(self, name: str) -> bool:
        """Whether the file system that a file lies in has reads past the page cache."""
        with self._said(name):
            return self._open_direct(name) is not None

    def _open_direct(self, name: str) -> int | None:
        with self._lock:
            if name not in self._direct:
                self._direct[name] = open_direct(self._path(name))
            return self._direct[name]

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Inside, what the system says of a file is an error that names it."""
        try:
            yield
        except OSError as error:
            problem = f"{self.spec}/{name}: reading failed: {reason(error)}"
            raise RunError(problem, "check the file, then run again") from error

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a hint
                os.posix_fadvise(self._open(name), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            return self._files[name]

    def __del__(self) -> None:
        for files in (getattr(self, "_files", {}), getattr(self, "_direct", {})):  # a signal may have ended __init__
            for file in files.values():
                if file is not None:
                    os.close(file)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size, time of change and inode; (-1, -1, -1) where the file is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (-1, -1, -1)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)
