"""Hashes of what headers do not show: a small file's content, and samples of a large one's tensors.

Two checkpoints of one architecture have equal headers. Reading a few KiB of every tensor costs next to nothing and
tells them apart, as long as more than a few rows differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from safeshard.manifests.hashing import hash_pieces
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.sources import Source, in_parallel

WHOLE_BYTES = 64 << 20  # up to this size, which most adapters have, a file is hashed whole
SAMPLE_BYTES = 16 << 10  # of one tensor
CHUNK_BYTES = 1 << 22


def middle(source: Source, ref: TensorRef, nbytes: int) -> bytes:
    """At most `nbytes` bytes from the middle of a tensor."""
    start = ref.offset + max(ref.nbytes - nbytes, 0) // 2
    return source.read(ref.file, start, min(start + nbytes, ref.offset + ref.nbytes))


def chunks(source: Source, file: str, offset: int, nbytes: int, size: int) -> Iterator[bytearray]:
    """`nbytes` bytes of a file from `offset` on, in pieces of `size` bytes."""
    for begin in range(0, nbytes, size):
        chunk = bytearray(min(size, nbytes - begin))
        source.readinto(file, offset + begin, memoryview(chunk))
        yield chunk


def hash_samples(source: Source, refs: Iterable[TensorRef]) -> str:
    """BLAKE3 of SAMPLE_BYTES from the middle of each tensor (all of a smaller one), one after another."""
    return hash_pieces(in_parallel(source, lambda ref: middle(source, ref, SAMPLE_BYTES), refs))


def hash_file(source: Source, name: str) -> str:
    """BLAKE3 of a whole file."""
    return hash_pieces(chunks(source, name, 0, source.sizes()[name], CHUNK_BYTES))


def sample_file(source: Source, name: str, tensors: Iterable[TensorRef]) -> str:
    """BLAKE3 of a safetensors file, whole up to WHOLE_BYTES; of a larger one of its tensors' samples as they lie."""
    if source.sizes()[name] <= WHOLE_BYTES:
        return hash_file(source, name)
    return hash_samples(source, sorted(tensors, key=attrgetter("offset", "nbytes", "name")))
