"""Whether two checkpoints hold the same weights: found out with as few reads as that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.sources import Source

Place = tuple[Source, TensorRef]
SAMPLE_BYTES = 4096
CHUNK_BYTES = 1 << 22


def same_tensors(pairs: Sequence[tuple[Place, Place]]) -> bool:
    """Whether all pairs of tensors are equal: dtype, shape and every byte. False where there are none.

    Different checkpoints show in a sample from the middle of a tensor, nearly always the first; only if no sample
    differs is everything read, which downloads the shards of a Hub repository.

    Raises:
        RunError: reading failed.
    """
    if not pairs or any(a.dtype != b.dtype or a.shape != b.shape for (_, a), (_, b) in pairs):
        return False
    return all(_sample(*a) == _sample(*b) for a, b in pairs) and all(
        mine == theirs for a, b in pairs for mine, theirs in zip(_chunks(*a), _chunks(*b), strict=True)
    )


def _sample(source: Source, ref: TensorRef) -> bytes:
    start = ref.offset + ref.nbytes // 2
    return source.read(ref.file, start, min(start + SAMPLE_BYTES, ref.offset + ref.nbytes))


def _chunks(source: Source, ref: TensorRef) -> Iterator[bytearray]:
    for begin in range(0, ref.nbytes, CHUNK_BYTES):
        chunk = bytearray(min(CHUNK_BYTES, ref.nbytes - begin))
        source.readinto(ref.file, ref.offset + begin, memoryview(chunk))
        yield chunk
