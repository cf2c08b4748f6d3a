"""Whether two checkpoints hold the same weights: found out with as few reads as that takes."""

from __future__ import annotations

from collections.abc import Sequence

from safeshard.streamer.header import TensorRef
from safeshard.streamer.sources import Source

Place = tuple[Source, TensorRef]
SAMPLE_BYTES = 4096
CHUNK_BYTES = 1 << 22


def same_tensors(pairs: Sequence[tuple[Place, Place]]) -> bool:
    """Whether all pairs are equal byte for byte.

    Different checkpoints show in a sample from the middle of a tensor, nearly always the first; only if no sample
    differs is everything read.
    """
    if any(a.dtype != b.dtype or a.shape != b.shape for (_, a), (_, b) in pairs):
        return False
    for width in (SAMPLE_BYTES, None):
        for (source_a, a), (source_b, b) in pairs:
            start = a.nbytes // 2 - a.nbytes // 2 % 8 if width else 0
            stop = min(a.nbytes, start + width) if width else a.nbytes
            for begin in range(start, stop, CHUNK_BYTES):
                end = min(begin + CHUNK_BYTES, stop)
                bytes_a = source_a.read(a.file, a.offset + begin, a.offset + end)
                if bytes_a != source_b.read(b.file, b.offset + begin, b.offset + end):
                    return False
    return bool(pairs)
