"""An output's way to its place afar: each large file as soon as it is finished, a few at a time in the background.

Whoever finishes a file waits while others are still on their way, so that an output never piles up on this machine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

from safeshard.manifests.errors import SafeshardError
from safeshard.streamer.write.destinations import Commit, Destination
from safeshard.streamer.write.journal import Journal

POLL = 0.1  # seconds until a failure or a stop is noticed
# Of this process: each upload holds some parts in memory, and the files behind it wait on the disk.
_UNDER_WAY = threading.BoundedSemaphore(2)
_ASKED = threading.BoundedSemaphore(4)


class Shipping:
    """The way of one output; without a `place` nothing happens. Thread-safe."""

    def __init__(self, place: Destination | None, tensors: Mapping[str, Collection[str]]) -> None:
        """`tensors` are the names of each large file's tensors."""
        self._place = place
        self.frees = place is not None and place.frees
        self._left = {file: set(names) for file, names in tensors.items()} if place is not None else {}
        self._file_of = {name: file for file, names in self._left.items() for name in names}
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def recover(self, staging: Path) -> None:
        """Bring what is needed to go on from a run on another machine."""
        if self._place is not None:
            self._place.recover(staging)

    def begin(self, journal: Journal) -> set[str]:
        """Claim the place; returns the files that lie there already and need not be written again."""
        there = set[str]() if self._place is None else self._place.begin(journal)
        for file in there:
            self._left.pop(file, None)
        return there

    def finished(self, tensors: Iterable[str]) -> list[str]:
        """Note tensors as written; returns the files that are complete now."""
        complete = []
        with self._lock:
            for name in tensors:
                file = self._file_of.get(name)
                if file in self._left and name in self._left[file]:
                    self._left[file].discard(name)
                    if not self._left[file]:
                        complete.append(file)
        return complete

    def give(self, name: str, path: Path, commit: Commit, free: Callable[[], None]) -> None:
        """Send a complete file off; waits while many others are on their way.

        Raises:
            RunError: it, or one before it, could not be brought there.
        """
        while not _ASKED.acquire(timeout=POLL):
            self._raise()
        thread = threading.Thread(target=partial(self._send, name, path, commit, free), name="upload", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _send(self, name: str, path: Path, commit: Commit, free: Callable[[], None]) -> None:
        try:
            assert self._place is not None
            with _UNDER_WAY:
                if self._stopped.is_set() or self._failures:
                    return
                self._place.upload(name, path, commit)
                if self.frees:
                    free()
        except BaseException as error:
            self._failures.append(error)
        finally:
            _ASKED.release()

    def wait(self) -> None:
        """Wait until all that was given is there.

        Raises:
            RunError: something could not be brought there.
        """
        for thread in self._threads:
            while thread.is_alive():
                thread.join(POLL)
                self._raise()
        self._raise()

    def _raise(self) -> None:
        if self._failures:
            raise self._failures[0]

    def publish(self, files: Mapping[str, Path]) -> None:
        """Bring the rest, the manifest last.

        Raises:
            RunError: it could not be brought there.
        """
        if self._place is not None:
            self._place.publish(files)

    def stop(self) -> None:
        """Give up what is under way."""
        self._stopped.set()
        if self._place is not None and any(thread.is_alive() for thread in self._threads):
            self._place.stop()
            for thread in self._threads:
                thread.join(10 * POLL)

    def forget(self) -> None:
        """Take away what was brought there, as far as that is possible, once what is under way has come."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        if self._place is not None:
            with contextlib.suppress(SafeshardError):  # the run's own error says more
                self._place.forget()
