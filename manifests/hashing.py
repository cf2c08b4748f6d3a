"""Hashes named in manifests: BLAKE3 of tensors and files, SHA-256 of safetensors headers (hex, lower case)."""

import hashlib
import os
from collections.abc import Callable, Iterable

from blake3 import blake3

CHUNK_BYTES = 1 << 20


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of a contiguous buffer. The global interpreter lock is released while hashing."""
    return blake3(data).hexdigest()


def hash_pieces(pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """BLAKE3 of contiguous buffers, one after another."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()


def hash_tensor_region(
    fd: int,
    offset: int,
    nbytes: int,
    progress: Callable[[int], None] | None = None,
    check: Callable[[memoryview], None] | None = None,
) -> str:
    """BLAKE3 of `nbytes` bytes at `offset` of an open file, by positional reads (threads may share the descriptor).

    `progress` is called with the number of bytes of each chunk, `check` with the chunk itself: CHUNK_BYTES, the last
    one less. Raises EOFError where the file ends early.
    """
    hasher = blake3()
    end = offset + nbytes
    buffer = memoryview(bytearray(min(CHUNK_BYTES, nbytes)))
    while offset < end:
        chunk = buffer[: end - offset]
        filled = 0
        while filled < len(chunk):
            count = os.preadv(fd, [chunk[filled:]], offset + filled)
            if not count:
                raise EOFError(f"the file ends at byte {offset + filled}, {end - offset - filled} bytes early")
            filled += count
        hasher.update(chunk)
        offset += len(chunk)
        if progress is not None:
            progress(len(chunk))
        if check is not None:
            check(chunk)
    return hasher.hexdigest()


def header_sha256(header: bytes | bytearray | memoryview) -> str:
    """SHA-256 of a safetensors header as it lies in the file: the 8 length bytes, then the `header` bytes given."""
    return hashlib.sha256(len(header).to_bytes(8, "little") + bytes(header)).hexdigest()
