"""Whether two checkpoints hold the same weights: found out with as few reads as that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.read import TORCH_DTYPES
from safeshard.streamer.inputs.samples import chunks, middle
from safeshard.streamer.inputs.vocabulary import common_rows
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


@dataclass(frozen=True)
class Difference:
    """Of the rows that two tensors both have, how many differ and by how much at most; and how many one has more."""

    rows: int
    common: int
    largest: float
    added: int

    @property
    def equal(self) -> bool:
        """Whether the rows that both have are equal."""
        return self.rows == 0


def row_difference(base: Place, other: Place) -> Difference:
    """Compare a tensor with one that may have more or fewer rows, by value: a cast from one dtype to the other is none.

    It takes a few MiB, however large they are.

    Raises:
        RunError: reading failed.
    """
    refs = common_rows(base[1], other[1])
    differing, largest, count = 0, 0.0, refs[0].shape[0] if refs[0].shape else 1
    width = max(1, refs[0].numel // max(count, 1))
    step = max(1, CHUNK_BYTES // (4 * width))
    for start in range(0, count, step):
        stop = min(start + step, count)
        ours, theirs = (
            _values(source, ref, start * width, (stop - start) * width).view(stop - start, width)
            for (source, _), ref in zip((base, other), refs, strict=True)
        )
        unequal = (ours.to(theirs.dtype) != theirs) & (theirs.to(ours.dtype) != ours)
        if bool(unequal.any()):
            differing += int(unequal.any(1).sum())
            largest = max(largest, float((ours.float() - theirs.float()).abs().nan_to_num(torch.inf).max()))
    added = other[1].shape[0] - base[1].shape[0] if other[1].shape and base[1].shape else 0
    return Difference(differing, count, largest, added)


def _values(source: Source, ref: TensorRef, start: int, count: int) -> torch.Tensor:
    data = bytearray(count * ref.item_bytes)
    source.readinto(ref.file, ref.offset + start * ref.item_bytes, memoryview(data))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[ref.dtype]) if data else torch.empty(0)


def _chunks(source: Source, ref: TensorRef) -> Iterator[bytearray]:
    return chunks(source, ref.file, ref.offset, ref.nbytes, CHUNK_BYTES)
