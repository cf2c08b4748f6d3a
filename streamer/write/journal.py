"""The journal of a job underway, from which an interrupted run resumes.

A file of JSON lines, appended and synced to the disk. The first line is the fingerprint of the request; each other
line is a record with a `kind`. Every line ends in its own CRC-32. A power cut may tear the last commit anywhere, so all
from the first damaged line on is dropped; where that is the fingerprint, the journal begins anew. What the records
speak of has hashes: losing a record loses work, never bytes.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.streamer.disk import open_own, sync_path, write_all
from safeshard.streamer.plan.ours import JOURNAL_MAGIC
from safeshard.streamer.plan.written.afar import MAX_JOURNAL_BYTES

MAGIC = JOURNAL_MAGIC.decode()
MAX_BYTES = MAX_JOURNAL_BYTES
ANEW = "--overwrite starts anew"
CRC_CHARS = len(',"crc":"00000000"}')
T = TypeVar("T")
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
log = logging.getLogger(__name__)


class HeldError(RequestError):
    """Another process is at work where this one was to be."""


class Journal:
    """An open journal; use `Journal.open`. Safe to share between threads; one process at a time holds it."""

    def __init__(self, path: Path, fd: int, size: int, committed: list[dict[str, Any]]) -> None:
        self.path = path
        self._fd = fd
        self._size = size
        self._committed = committed
        self._unread: list[str] = []  # committed after those, as JSON: hardly anyone asks for them
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._broken = False

    @classmethod
    def open(cls, path: Path, fingerprint: dict[str, Any]) -> "Journal":
        """Create the journal at `path`, or reopen the one there and recover its records.

        `fingerprint` is JSON: all that the output's bytes depend on. Raises RequestError where the journal there
        belongs to another request (every difference is listed), is another file, or is held by another process.
        """
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            _hold(fd, path)
            return cls._recover(path, fd, json.loads(_dumps(fingerprint)))
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _recover(cls, path: Path, fd: int, fingerprint: dict[str, Any]) -> "Journal":
        content = _content(fd)
        lines = content.split(b"\n")[:-1]
        found = list(takewhile(bool, (_parse(number, line) for number, line in enumerate(lines))))
        if len(found) < len(lines):
            log.warning("%s is damaged from line %d on: what it says there is done again", path, len(found) + 1)
        if not found:
            return cls._begin(path, fd, content, fingerprint)
        first, *records = found
        size = sum(len(line) + 1 for line in lines[: len(found)])
        _same_fingerprint(path, first.get("fingerprint"), fingerprint)
        os.ftruncate(fd, size)
        return cls(path, fd, size, records)

    @classmethod
    def _begin(cls, path: Path, fd: int, content: bytes, fingerprint: dict[str, Any]) -> "Journal":
        if not MAGIC.encode().startswith(content[: len(MAGIC)].rstrip(b"\0")):
            raise RequestError(Offence(str(path), expected="a safeshard journal", got="another file", remedy=ANEW))
        line = _line(_dumps({"journal": "safeshard.journal/1", "fingerprint": fingerprint}))
        os.ftruncate(fd, 0)
        write_all(fd, memoryview(line), 0)
        os.fsync(fd)
        sync_path(path.parent)
        return cls(path, fd, len(line), [])

    @classmethod
    def claim(cls, path: Path) -> "Journal":
        """Hold the journal at `path` without reading it, to discard its folder.

        Raises RequestError where another process holds it.
        """
        fd = open_own(path, os.O_RDWR)
        try:
            _hold(fd, path)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, 0, [])

    def record(self, kind: str, **payload: Any) -> None:
        """Hold a record for the next commit; `payload` is JSON."""
        record = _dumps({"kind": kind, **payload})
        with self._lock:
            self._pending.append(record)

    def sign(self) -> None:
        """Note durably which process holds the journal, for whoever is refused meanwhile."""
        self.record("owner", pid=os.getpid(), host=socket.gethostname())
        self.commit()

    def commit(self, sync: Callable[[], None] | None = None) -> None:
        """Make the records held so far durable, in one write and one sync; when it returns, they are.

        `sync` makes the data durable that the records speak of. It is called after the records to commit are chosen:
        a record that another thread adds meanwhile waits for the next commit, as its data may have missed the sync.
        """
        with self._commit_lock:
            if self._broken:
                raise RunError(f"the journal {self.path} could not be written", remedy="run the same command again")
            with self._lock:
                chosen, self._pending = self._pending, []
            if not chosen:
                return
            self._broken = True  # after a failed write or sync, what the disk holds is unknown until it is read again
            if sync is not None:
                sync()
            lines = b"".join(map(_line, chosen))
            write_all(self._fd, memoryview(lines), self._size)
            os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
            self._size += len(lines)
            self._broken = False
            with self._lock:
                self._unread.extend(chosen)

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """The committed records of one kind, in the order of their commits, those of earlier runs first."""
        with self._lock:
            self._committed.extend(map(json.loads, self._unread))
            self._unread.clear()
            return [entry for entry in self._committed if entry["kind"] == kind]

    def sound(self, kind: str, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
        """The committed records of one kind, parsed. What was forged is left out: its work is done again."""
        for record in self.entries(kind):
            try:
                yield parse(record)
            except (KeyError, TypeError, ValueError):
                log.warning("%s: a record of kind %s makes no sense and is left out", self.path, kind)

    def close(self) -> None:
        """Release the file. Records not committed are dropped: only the caller knows whether their data is synced."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sound_records(content: bytes, kind: str) -> Iterator[dict[str, Any]]:
    """The records of one kind in the bytes of a journal, up to its first damaged line."""
    lines = enumerate(content.split(b"\n")[:-1])
    found = takewhile(bool, (_parse(number, line) for number, line in lines))
    return (record for record in found if record.get("kind") == kind)


def name_and_hash(record: dict[str, Any]) -> tuple[str, str]:
    """What the journal notes of a finished tensor.

    Raises:
        TypeError: it is forged.
    """
    name, digest = record["name"], record["blake3"]
    if not isinstance(name, str) or not isinstance(digest, str):
        raise TypeError
    return name, digest


def _dumps(value: object) -> str:
    return _ENCODER.encode(value)


def _line(record: str) -> bytes:
    body = record[:-1].encode("ascii")
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def _parse(number: int, line: bytes) -> dict[str, Any]:
    """The record of a line; empty where the line is damaged."""
    body, tail = line[:-CRC_CHARS], line[-CRC_CHARS:]
    if tail != b',"crc":"%08x"}' % zlib.crc32(body) or (number == 0) != body.startswith(MAGIC.encode()):
        return {}
    try:
        record = json.loads(body + b"}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or not (number == 0 or isinstance(record.get("kind"), str)):
        return {}
    return record


def _hold(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        offence = Offence(str(path), expected="no other run with this output", got=_owner(fd), remedy="wait for it")
        raise HeldError(offence) from error
    except OSError:
        pass  # a file system without locks; two runs at once are then the user's to avoid
    try:
        there = os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        there = False
    if not there:
        raise HeldError(Offence(str(path), "", "no other run with this output", "one that ended just now", "run again"))


def _content(fd: int) -> bytes:
    """All of a journal; it is no larger than one that is written here can be."""
    content = bytearray()
    size = min(os.fstat(fd).st_size, MAX_BYTES)
    while part := os.pread(fd, size - len(content), len(content)):
        content += part
    return bytes(content)


def _owner(fd: int) -> str:
    """Who holds a journal, by the last owner that it names; its lock ends with that process."""
    for line in reversed(_content(fd).split(b"\n")):
        if line.startswith(b'{"kind":"owner",'):
            with contextlib.suppress(ValueError, KeyError):
                record = json.loads(line)
                return f"one underway: process {record['pid']} on {record['host']}"
    return "one underway"


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Leaves of nested JSON as (path, JSON text); an empty container is a leaf."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path, _dumps(value)


def differences(where: str, theirs: dict[str, Any], ours: dict[str, Any], remedy: str) -> Iterator[Offence]:
    """An offence for each value in which two fingerprints differ: theirs was expected, ours was got."""
    return _differences(where, dict(_leaves(theirs)), dict(_leaves(ours)), remedy)


def _differences(
    where: str, before: dict[tuple[str, ...], str], now: dict[tuple[str, ...], str], remedy: str
) -> Iterator[Offence]:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield Offence(where, ".".join(key), before.get(key, "nothing"), now.get(key, "nothing"), remedy)


def _same_fingerprint(path: Path, theirs: object, ours: dict[str, Any]) -> None:
    try:
        before, now = dict(_leaves(theirs)), dict(_leaves(ours))
    except (ValueError, RecursionError):  # NaN, or nested too deep: none that was written here
        offence = Offence(str(path), "line 1", "the fingerprint of a request", "something else", ANEW)
        raise RequestError(offence) from None
    remedy = f"the unfinished output belongs to another request; {ANEW}"
    if offences := list(_differences(str(path), before, now, remedy)):
        raise RequestError(offences)
