"""Whether two checkpoints hold the same weights: found out with as few reads as that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.samples import chunks, middle
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
    return all(middle(*a, SAMPLE_BYTES) == middle(*b, SAMPLE_BYTES) for a, b in pairs) and all(
        mine == theirs for a, b in pairs for mine, theirs in zip(_chunks(*a), _chunks(*b), strict=True)
    )


def _chunks(source: Source, ref: TensorRef) -> Iterator[bytearray]:
    return chunks(source, ref.file, ref.offset, ref.nbytes, CHUNK_BYTES)
