"""Whole shards in the Hub's cache, under a budget: downloaded once, hashed on the way, dropped when room is needed.

The layout is the one that huggingface_hub documents: blobs/<hash>, snapshots/<commit>/<file> as links to them, and
refs/<branch>. So other tools find what was downloaded, and a later run goes on offline. A download that was cut off is
gone on with. Of what is there already nothing is ever dropped, but for what an earlier run brought under a budget.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import reason, short
from safeshard.streamer.sources.http import PIECE, Target
from safeshard.streamer.sources.hub.stated import Stated, hash_open_file
from safeshard.streamer.sources.remote import DISK_FULL, POLL, Line, Stopped

WINDOW = 8 * PIECE  # bytes that are downloaded side by side, in order: what is on disk has no gaps
OURS = ".safeshard"  # beside a blob that a budget may drop
log = logging.getLogger(__name__)


@dataclass
class _Shard:
    blob: Path
    size: int
    fd: int | None  # None: from an earlier run, and not used yet
    ours: bool  # whether a budget may drop it
    users: int = 0


@dataclass(frozen=True)
class Wanted:
    """A file of a commit: where the Hub's cache has its place, what the Hub states of it, and where it comes from."""

    place: Path  # of the repository in the cache
    commit: str
    file: Stated
    target: Target

    @property
    def blob(self) -> Path:
        return self.place / "blobs" / self.file.etag


class ShardCache:
    """The shards that are read from the Hub's cache. `fetches` says whether missing ones are downloaded to it.

    `budget` (bytes) bounds what is downloaded; None keeps everything.
    """

    def __init__(self, fetches: bool = False, budget: int | None = None) -> None:
        self.fetches, self.budget = fetches, budget
        self._shards: OrderedDict[Path, _Shard] = OrderedDict()  # the least recently used first
        self._damaged: set[Path] = set()
        self._reserved = 0  # bytes of the downloads under way
        self._changed = threading.Condition()
        self._locks: dict[Path, threading.Lock] = {}
        if budget is not None:
            self._adopt(hub_cache())

    def has(self, wanted: Wanted) -> bool:
        """Whether a copy of the right size is there, and not known to be damaged."""
        try:
            return wanted.blob.stat().st_size == wanted.file.size and wanted.blob not in self._damaged
        except OSError:
            return False

    def readinto(self, line: Line, wanted: Wanted, offset: int, view: memoryview) -> bool:
        """Fill `view` from a shard, which is fetched first if need be; False where it is not there, nor to be fetched.

        Raises:
            RunError: it cannot be fetched, is not what the Hub states, or the disk is full.
        """
        if not self.fetches and not self.has(wanted):
            return False
        with self._use(line, wanted) as fd:
            position = 0
            while fd is not None and position < len(view):
                count = os.preadv(fd, [view[position:]], offset + position)
                if count == 0:
                    raise short(wanted.target.where, offset + position, offset + len(view))
                position += count
        return fd is not None

    @contextmanager
    def _use(self, line: Line, wanted: Wanted) -> Iterator[int | None]:
        blob = wanted.blob
        with self._changed:
            lock = self._locks.setdefault(blob, threading.Lock())
        with lock:  # one download a shard, however many readers wait for it
            with self._changed:
                shard = self._shards.get(blob)
                if shard is not None:
                    shard.users += 1
                    self._shards.move_to_end(blob)
            if shard is None or shard.fd is None:
                shard = self._found(line, wanted, shard) or (self._fetched(line, wanted) if self.fetches else None)
        try:
            yield None if shard is None else shard.fd
        finally:
            with self._changed:
                if shard is not None:
                    shard.users -= 1
                self._changed.notify_all()

    def _found(self, line: Line, wanted: Wanted, known: _Shard | None) -> _Shard | None:
        """A shard that is there already, hashed before anything of it is used; None where it is not, or is damaged."""
        blob, file = wanted.blob, wanted.file
        fd = os.open(blob, os.O_RDONLY | os.O_CLOEXEC) if self.has(wanted) else None
        if fd is not None:
            hasher = file.hasher()
            hash_open_file(fd, hasher, line.stopped, file.size)
            if line.stopped.is_set():
                os.close(fd)
                raise Stopped(wanted.target.where)
            if not file.etag or hasher.hexdigest() == file.etag:
                _link(wanted)
                shard = known or _Shard(blob, file.size, fd, ours=False, users=1)
                with self._changed:
                    shard.fd = fd
                    self._shards[blob] = shard
                return shard
            os.close(fd)
        if fd is not None or blob.exists():
            self._damaged.add(blob)
            log.warning("%s: the copy in the cache is damaged and left alone; remove it: %s", wanted.target.where, blob)
        with self._changed:
            self._shards.pop(blob, None)
        return None

    def _fetched(self, line: Line, wanted: Wanted) -> _Shard:
        size = wanted.file.size
        self._make_room(line, wanted.target.where, size)
        try:
            fd = _download(line, wanted, marked=self.budget is not None)
            _link(wanted)
        except OSError as error:
            raise _disk_error(wanted, error) from error
        finally:
            with self._changed:
                self._reserved -= size
                self._changed.notify_all()
        shard = _Shard(wanted.blob, size, fd, ours=self.budget is not None, users=1)
        with self._changed:
            self._shards[wanted.blob] = shard
        return shard

    def _make_room(self, line: Line, where: str, nbytes: int) -> None:
        """Reserve `nbytes`: drop the shards that were used longest ago, and wait while all that is left is in use."""
        with self._changed:
            if self.budget is not None and nbytes > self.budget:
                raise RunError(f"{where}: {nbytes} bytes, --cache-budget is {self.budget}", "raise --cache-budget")
            while self.budget is not None and self._held() + nbytes > self.budget:
                idle = next((shard for shard in self._shards.values() if shard.ours and not shard.users), None)
                if idle is not None:
                    del self._shards[idle.blob]
                    _drop(idle)
                elif not self._changed.wait(POLL) and line.stopped.is_set():
                    raise Stopped(where)
            self._reserved += nbytes

    def _held(self) -> int:
        return self._reserved + sum(shard.size for shard in self._shards.values() if shard.ours)

    def _adopt(self, cache: Path) -> None:
        """Count what earlier runs brought under a budget: it is used again, or the first to go."""
        for mark in cache.glob(f"models--*/blobs/*{OURS}"):
            blob = mark.with_name(mark.name.removesuffix(OURS))
            try:
                self._shards[blob] = _Shard(blob, blob.stat().st_size, None, ours=True)
            except FileNotFoundError:
                mark.unlink(missing_ok=True)

    def __del__(self) -> None:
        for shard in getattr(self, "_shards", {}).values():  # a signal may have ended __init__ before it began
            if shard.fd is not None:
                os.close(shard.fd)


def hub_cache() -> Path:
    """The Hub's cache of this user."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def keep_small(wanted: Wanted, data: bytes) -> None:
    """Put a small file into the cache, whole or not at all."""
    try:
        part = wanted.blob.with_name(f"{wanted.blob.name}.safeshard.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(wanted.blob)
        _link(wanted)
    except OSError as error:
        raise _disk_error(wanted, error) from error


def note_branch(place: Path, revision: str | None, commit: str) -> None:
    """Note which commit a branch is at, so that its name works offline."""
    if revision != commit:
        path = place / "refs" / (revision or "main")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


def _download(line: Line, wanted: Wanted, marked: bool) -> int:
    """Download a file and return its descriptor, once its hash is what the Hub states."""
    blob = wanted.blob
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.safeshard.part")
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        while True:  # another process may be at it
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if line.stopped.wait(POLL):
                    raise Stopped(wanted.target.where) from None
        _append(line, fd, wanted)
        if marked:
            blob.with_name(blob.name + OURS).touch()
        if part.exists():  # else it has become the blob while this process waited
            part.replace(blob)
        return fd
    except BaseException:
        os.close(fd)
        raise


def _append(line: Line, fd: int, wanted: Wanted) -> None:
    """Bring a part to its full size. One that is damaged is begun anew, once."""
    file, target = wanted.file, wanted.target
    for begun in (os.fstat(fd).st_size, 0):
        hasher, position = file.hasher(), min(begun, file.size)
        os.ftruncate(fd, position)
        hash_open_file(fd, hasher, line.stopped, position)
        buffer = memoryview(bytearray(min(WINDOW, file.size - position)))
        while position < file.size:
            view = buffer[: file.size - position]
            target.fill(line, position, view)
            hasher.update(view)
            written = 0
            while written < len(view):
                written += os.pwrite(fd, view[written:], position + written)
            position += len(view)
        if line.stopped.is_set():
            raise Stopped(target.where)
        if not file.etag or hasher.hexdigest() == file.etag:
            return
    os.ftruncate(fd, 0)
    raise damaged(target.where, file)


def damaged(where: str, file: Stated) -> RunError:
    """The error of a file that is not what the Hub states, as it came."""
    problem = f"{where}: what came is not what the Hub states of it ({'sha256' if file.sha256 else 'git'} {file.etag})"
    return RunError(problem, "use another mirror or network, then run the same command again")


def _link(wanted: Wanted) -> None:
    pointer, blob = wanted.place / "snapshots" / wanted.commit / wanted.file.path, wanted.blob
    if not pointer.exists() or pointer.resolve() != blob.resolve():
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))


def _drop(shard: _Shard) -> None:
    if shard.fd is not None:
        os.close(shard.fd)
    blob = shard.blob
    for pointer in blob.parent.parent.glob("snapshots/*/**/*"):
        if pointer.is_symlink() and pointer.resolve() == blob:
            pointer.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    blob.with_name(blob.name + OURS).unlink(missing_ok=True)


def _disk_error(wanted: Wanted, error: OSError) -> RunError:
    where, cache = wanted.target.where, wanted.place.parent
    if error.errno in DISK_FULL:
        remedy = "free some (`hf cache rm`), set HF_HOME to a larger disk, or leave out --cache"
        return RunError(f"{where}: no room in the Hub's cache, {cache}: {reason(error)}", remedy)
    return RunError(f"{where}: the Hub's cache, {cache}, cannot be written: {reason(error)}", "set HF_HOME")
