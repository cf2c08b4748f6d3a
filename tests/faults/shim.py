"""Wraps the system calls by which this process changes files below one folder: counts them, and strikes at one.

Installed in a forked child before the run. Calls elsewhere, and calls that change nothing, pass through uncounted.
What the writer does is serialised, so that the log of calls is the order in which they took effect.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGING = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC
BY_FD = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "copy_file_range")
BY_PATH = ("open", "mkdir", "rename", "replace", "unlink", "rmdir")
SIZED = ("write", "pwrite", "copy_file_range")


class Shim:
    """One fault, a mapping with `kind`:

    count: none, but `calls` has the number of calls, and `log` what they did (for `disk.Disk`).
    kill: SIGKILL before call number `at`; a write's first `keep` (0 to 1) of its bytes come through.
    errno: call number `at` fails with `errno`.
    full: after `bytes` bytes no more fit: writes stop short, then fail with ENOSPC; so does the reservation of space
        unless `late`, as on a file system that cannot reserve.
    read: reads of files come in pieces (seeded by `seed`); read number `at`, if given, fails with EIO.
    """

    def __init__(self, root: Path, fault: dict[str, Any]) -> None:
        self.root, self.fault, self.kind = str(root), fault, fault["kind"]
        self.calls = self.reads = 0
        self.log: list[list[Any]] = []
        self._room = fault.get("bytes", 0)
        self._random = random.Random(fault.get("seed", 0))
        self._lock = threading.RLock()

    def install(self) -> None:
        for name in BY_FD + BY_PATH:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        if self.kind == "read":
            os.preadv = self._reading(os.preadv)
            os.copy_file_range = self._no_copy

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            place = self._place(name, args, kwargs)
            if place is None:
                return original(*args, **kwargs)
            with self._lock:
                number, self.calls = self.calls, self.calls + 1
                if number == self.fault.get("at") and self.kind in ("kill", "errno"):
                    self._strike(name, original, args)
                if self.kind == "full":
                    args = self._fit(name, args)
                existed = os.path.lexists(place)
                before = os.lseek(args[0], 0, os.SEEK_CUR) if name == "write" else 0
                result = original(*args, **kwargs)
                if self.kind == "count":
                    self._note(name, args, place, existed, before, result)
                return result

        return call

    def _place(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The path that a call changes, if it is below the root."""
        if name in BY_FD:
            path = self._of_fd(args[1] if name == "copy_file_range" else args[0])
        elif name == "open" and not args[1] & CHANGING:
            return None
        else:
            folder = kwargs.get("dir_fd")
            path = os.fspath(args[0])
            path = os.path.join(self._of_fd(folder) if folder is not None else os.getcwd(), path)  # noqa: PTH118, PTH109
        return path if path == self.root or path.startswith(self.root + "/") else None

    @staticmethod
    def _of_fd(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115

    def _strike(self, name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self.kind == "errno":
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]))
        if name in SIZED and self.fault.get("keep"):
            size = args[2] if name == "copy_file_range" else len(args[1])
            cut = int(size * self.fault["keep"])
            original(
                *((*args[:2], cut, *args[3:]) if name == "copy_file_range" else (args[0], args[1][:cut], *args[2:]))
            )
        os.kill(os.getpid(), signal.SIGKILL)

    def _fit(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A write's arguments, cut to the room that is left."""
        if name == "posix_fallocate":
            if self.fault.get("late"):
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            if args[2] > self._room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name not in SIZED:
            return args
        size = args[2] if name == "copy_file_range" else len(args[1])
        if size and not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        cut = min(size, self._room)
        self._room -= cut
        return (*args[:2], cut, *args[3:]) if name == "copy_file_range" else (args[0], args[1][:cut], *args[2:])

    def _note(self, name: str, args: tuple[Any, ...], place: str, existed: bool, before: int, result: Any) -> None:
        if place.endswith(" (deleted)"):
            return
        if name == "open":
            if args[1] & os.O_TMPFILE == os.O_TMPFILE:
                return
            self.log.append(["open", place, existed, bool(args[1] & os.O_TRUNC)])
        elif name in ("pwrite", "write"):
            offset = args[2] if name == "pwrite" else before
            self.log.append(["write", place, offset, bytes(args[1])[:result].decode("latin-1")])
        elif name == "copy_file_range":
            self.log.append(["write", place, args[4], os.pread(args[1], result, args[4]).decode("latin-1")])
        elif name in ("ftruncate", "posix_fallocate"):
            self.log.append(["size", place, os.fstat(args[0]).st_size])
        elif name in ("rename", "replace"):
            self.log.append(["rename", place, os.path.abspath(args[1])])  # noqa: PTH100
        else:
            self.log.append([name.replace("fdatasync", "fsync"), place])

    def _reading(self, original: Callable[..., int]) -> Callable[..., int]:
        def preadv(fd: int, buffers: Any, offset: int, *more: int) -> int:
            with self._lock:
                number, self.reads = self.reads, self.reads + 1
                cut = self._random.random()
            if number == self.fault.get("at"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view = memoryview(buffers[0])
            return original(fd, [view[: max(1, int(len(view) * cut))]], offset, *more)

        return preadv

    @staticmethod
    def _no_copy(*args: Any) -> int:
        """Copies inside the kernel would pass the reads by."""
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
