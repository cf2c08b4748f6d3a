"""A stranger's program, such as a chat template, in a process of its own with a limit of time and memory.

A sandbox holds a template off what it must not touch; of time and memory it counts nothing. `10**(10**8)` is one step,
and so is `'a'|center(10**9)`. So the work is done in a fork, which the system ends where it takes more than is allowed.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import finalize

CPU_SECONDS = 8  # of processor time for the first `EACH` that a process is asked, and one more for each as many
EACH = 100
MEMORY_BYTES = 512 << 20  # beyond what the process has when it begins
WALL_SECONDS = 120.0  # for one answer, on a machine that has other things to do

Asked = TypeVar("Asked")


class LimitError(Exception):
    """It took more than it may. `str()` says of what."""


class WorkError(Exception):
    """The work raised an exception. `str()` is its text."""


class Bounded(Generic[Asked]):
    """Calls `work` in a process that is forked when it is first needed, and ended when this goes.

    `work` gets what is asked and answers with text. What it answers to each is all that comes back: nothing of this
    process changes.
    """

    def __init__(self, work: Callable[[Asked], str], *, seconds: int = CPU_SECONDS, memory: int = MEMORY_BYTES) -> None:
        self._work, self._seconds, self._memory = work, seconds, memory
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, asked: Asked) -> str:
        """The answer.

        Raises:
            LimitError: the process was ended, now or before: it takes too long, or too much memory.
            WorkError: the work raised an exception.
        """
        if self._process is None:
            self._start()
        connection = self._connection
        if connection is None:
            raise LimitError(f"more than {self._seconds} s of processor time")
        try:
            connection.send(asked)
            if not connection.poll(WALL_SECONDS):
                raise LimitError(f"no end within {WALL_SECONDS:.0f} s")
            kind, text = connection.recv()
        except LimitError:
            self.close()
            raise
        except (EOFError, OSError) as error:
            self.close()
            raise LimitError(f"more than {self._seconds} s of processor time") from error
        if kind == "memory":
            raise LimitError(f"more than {self._memory >> 20} MiB of memory")
        if kind == "error":
            raise WorkError(text)
        return str(text)

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        limits = (self._seconds, self._memory)
        self._process = context.Process(target=_serve, args=(self._work, theirs, ours, limits), daemon=True)
        with warnings.catch_warnings():  # of other threads, whose locks the work does not take
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        self._connection = ours
        finalize(self, _stop, self._process, ours)

    def close(self) -> None:
        """End the process; nothing can be asked any more."""
        if self._connection is not None:
            _stop(self._process, self._connection)
        self._connection = None


def _stop(process: Any, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.join()


def _serve(work: Callable[[Any], str], connection: Connection, ours: Connection, limits: tuple[int, int]) -> None:
    """Answer until the other end is closed."""
    ours.close()  # else it would never be seen to be closed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the whole group gets it; whoever asks decides
    for each in (signal.SIGTERM, signal.SIGXCPU):
        signal.signal(each, signal.SIG_DFL)
    gc.freeze()  # else a collection would write to every page that is shared with who asks
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # a library's warning belongs to no one
        os.dup2(nowhere, stream)
    seconds, memory = limits
    _limit_memory(memory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for count in itertools.count():
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        allowed = seconds + count // EACH
        resource.setrlimit(resource.RLIMIT_CPU, (allowed if most < 0 else min(allowed, most), most))
        try:
            asked = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = ("text", work(asked))
        except MemoryError:
            answer = ("memory", "")
        except Exception as error:  # a template may raise anything
            answer = ("error", str(error)[:1000])
        try:
            connection.send(answer)
        except (MemoryError, ValueError):
            connection.send(("memory", ""))


def _limit_memory(memory: int) -> None:
    if sys.platform == "linux":  # elsewhere the limit is not kept
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(ValueError):  # a lower one is in force
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
