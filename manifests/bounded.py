"""Files from elsewhere, read and parsed within bounds: on what they are made of, not on their bytes alone.

A byte of JSON can cost sixty of memory: `[]` is a list. So its values are counted before it is parsed.
"""

import errno
import os
import stat
from pathlib import Path

MAX_TENSORS = 200_000  # of a checkpoint; the largest published have some 150,000
MAX_VALUES = 3_000_000  # of one JSON text: a header of that many tensors has 1.8 million


class TooLargeError(ValueError):
    """A file has more bytes than allowed, which are its arguments: (allowed, found)."""


def refuse_many(text: bytes, most: int = MAX_VALUES) -> None:
    """Raise ValueError where a JSON text may hold more than `most` values: counted by what stands between them.

    Commas and brackets inside of strings count too, so that no text is parsed to count it.
    """
    if len(text) > most and sum(map(text.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"more than {most} values")


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a regular file, links followed. It may grow meanwhile, or say that it is empty: `most` holds.

    Raises:
        TooLargeError: it has more than `most` bytes.
        OSError: it cannot be read, or is a device, a pipe or a terminal, whose reading may never end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if status.st_size > most:
            raise TooLargeError(most, status.st_size)
        data = file.read(most + 1)
    if len(data) > most:
        raise TooLargeError(most, len(data))
    return data
