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


def hash_tensor_region(fd: int, offset: int, nbytes: int, progress: Callable[[int], None] | None = None) -> str:
    """BLAKE3 of `nbytes` bytes at `offset` of an open file, by positional reads (threads may share the descriptor).

    `progress` is called with the number of bytes of each chunk. Raises EOFError where the file ends early.
    """
    hasher = blake3()
    end = offset + nbytes
    while offset < end:
        chunk = os.pread(fd, min(CHUNK_BYTES, end - offset), offset)
        if not chunk:
            raise EOFError(f"the file ends at byte {offset}, {end - offset} bytes early")
        hasher.update(chunk)
        offset += len(chunk)
        if progress is not None:
            progress(len(chunk))
    return hasher.hexdigest()


def header_sha256(header: bytes | bytearray | memoryview) -> str:
    """SHA-256 of a safetensors header as it lies in the file: the 8 length bytes, then the `header` bytes given."""
    return hashlib.sha256(len(header).to_bytes(8, "little") + bytes(header)).hexdigest()
