"""Reading past the page cache (O_DIRECT): the disk writes straight into our memory.

A read through the page cache copies every byte, and drops what others keep there. Past it a gigabyte costs a fraction
of the processor time (bench/results/io.csv). The system wants offsets, lengths and memory in whole blocks: a span of
blocks is read around the bytes that are wanted, and these begin somewhere in its first block.

io_uring is not used: it saves the system calls of small reads, and a read of megabytes is one.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from safeshard.streamer.sources.base import Source

BLOCK = 4096  # of offsets, lengths and addresses: no disk's is larger
LEAST = 2 << 20  # bytes of a read that is worth it
PIECE = 8 << 20  # bytes of a system call: a signal waits for one, and a disk has enough to do
BOUNCE = 2 << 20  # of memory in whole blocks, a thread, for what must come to lie elsewhere: it stays in a core's cache
REFUSED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}  # what a file system says that cannot
_bounces = threading.local()


@runtime_checkable
class Near(Protocol):
    """A source that can read past the page cache."""

    direct: bool

    def readinto_room(self, name: str, offset: int, nbytes: int, room: memoryview) -> int: ...


def passes_by(source: Source, offset: int, item_bytes: int) -> bool:
    """Whether a tensor at `offset` is read past the page cache and used where its bytes come to lie.

    They lie in memory as in the file, so that its values must not lie across the processor's words there.
    """
    return isinstance(source, Near) and source.direct and offset % item_bytes == 0


def into_room(source: Source, name: str, offset: int, nbytes: int, room: memoryview) -> int:
    """Read into memory that begins at a block and has `room_of(nbytes)` bytes; returns where in it the bytes begin."""
    if isinstance(source, Near):
        return source.readinto_room(name, offset, nbytes, room)
    source.readinto(name, offset, room[:nbytes])
    return 0


def room_of(nbytes: int) -> int:
    """Bytes of memory in whole blocks that hold `nbytes` of a file wherever they begin in a block."""
    return nbytes if nbytes < LEAST else -(-nbytes // BLOCK) * BLOCK + BLOCK


def blocks(nbytes: int) -> memoryview:
    """Memory that begins and ends at a block."""
    memory = mmap.mmap(-1, -(-max(nbytes, 1) // BLOCK) * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a hint, which a kernel may not know
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def open_direct(path: str | os.PathLike[str]) -> int | None:
    """A descriptor to read past the page cache with; None where the system or the file system refuses.

    Raises:
        OSError: the file cannot be opened at all.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.preadv(fd, [blocks(BLOCK)], 0)  # some say so only then
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno not in REFUSED:
            raise
        return None
    return fd


def read_span(fd: int, start: int, span: memoryview) -> int:
    """Fill `span`, whole blocks of memory, from the block at `start` on. How many bytes came: all but at its end.

    Raises:
        OSError: reading failed.
    """
    done = 0
    while done < len(span):
        count = os.preadv(fd, [span[done : done + PIECE]], start + done)
        whole = (done + count) // BLOCK * BLOCK  # the next read begins at a block again
        if whole == done:
            return done + count
        done = whole
    return done


def read_around(fd: int, offset: int, nbytes: int, room: memoryview) -> tuple[int, int]:
    """Read `nbytes` at `offset` into `room`, whole blocks of memory: where in it they begin, and how many came."""
    head = offset % BLOCK
    span = room[: -(-(head + nbytes) // BLOCK) * BLOCK]
    return head, min(nbytes, max(0, read_span(fd, offset - head, span) - head))


def read_aside(fd: int, offset: int, view: memoryview) -> int:
    """Fill memory that lies anywhere, by way of a small one in whole blocks. How many bytes came."""
    if not hasattr(_bounces, "memory"):
        _bounces.memory = blocks(BOUNCE)
    done = 0
    while done < len(view):
        wanted = min(len(view) - done, BOUNCE - (offset + done) % BLOCK)
        head, count = read_around(fd, offset + done, wanted, _bounces.memory)
        view[done : done + count] = _bounces.memory[head : head + count]
        done += count
        if count < wanted:
            break
    return done


def pieces(source: Source, name: str, offset: int, nbytes: int, length: int) -> Iterator[memoryview]:
    """Bytes of a file in order, `length` at a time. A piece holds until the next is asked for, which is being read.

    Nothing else reads ahead of what passes the page cache by.
    """
    rooms = [blocks(room_of(min(length, size))) for size in (nbytes, nbytes - length) if size > 0 or size == nbytes]

    def read(begin: int) -> memoryview:
        room, count = rooms[begin // length % 2], min(length, nbytes - begin)
        head = into_room(source, name, offset + begin, count, room)
        return room[head : head + count]

    with ThreadPoolExecutor(1, "ahead") as ahead:
        coming = ahead.submit(read, 0)  # of nothing, where there is nothing
        for begin in range(length, nbytes, length):
            piece = coming.result()
            coming = ahead.submit(read, begin)
            yield piece
        yield coming.result()
