"""What is read together: a tensor to read, and a step of work with all that it reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.sources import Source
from safeshard.streamer.sources.direct import into_room, passes_by, room_of

ALIGN = 64  # torch's own alignment: vectorised arithmetic takes the same path wherever a tensor lies in a buffer


GRAIN = 1 << 20


TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """A tensor to read."""

    source: Source
    ref: TensorRef

    @cached_property
    def key(self) -> Hashable:
        return (self.source.identity, self.ref.file, self.ref.offset, self.ref.nbytes, self.ref.name)

    @property
    def room(self) -> int:
        """Bytes of a step's buffer for it: of a large one whole blocks, whichever way it is read."""
        return aligned(room_of(self.ref.nbytes))

    @property
    def passes_by(self) -> bool:
        """Whether it is read past the page cache and used where its bytes come to lie."""
        return passes_by(self.source, self.ref.offset, self.ref.item_bytes)

    def into(self, room: memoryview) -> int:
        """Read into its room; returns where in it the tensor begins.

        Where it begins in a block as in its file nothing is copied. Values of more than two bytes are: matrix products
        take them as they lie, and may round otherwise where they lie otherwise; smaller ones are converted first.
        """
        ref = self.ref
        if ref.item_bytes <= 2 and self.passes_by:
            return into_room(self.source, ref.file, ref.offset, ref.nbytes, room)
        self.source.readinto(ref.file, ref.offset, room[: ref.nbytes])
        return 0


@dataclass
class Step:
    """One unit of work: tensors read together, computed on by one worker.

    `scratch` is the host bytes that computing adds; `copied` the bytes moved without passing through a buffer. A step
    with `strips` has no reads: it is one large tensor's, which its worker reads strip by strip.
    """

    name: str
    reads: dict[Hashable, Read] = field(default_factory=dict)
    tasks: list[Any] = field(default_factory=list)
    scratch: int = 0
    copied: int = 0
    strips: bool = False

    @property
    def nbytes(self) -> int:
        return sum(aligned(r.ref.nbytes) for r in self.reads.values())

    @property
    def buffer(self) -> int:
        """Bytes of the buffer that it is read into."""
        return aligned(sum(read.room for read in self.reads.values()), GRAIN)

    @property
    def cost(self) -> int:
        """Host bytes the step holds while it is in flight."""
        return self.buffer + self.scratch

    def rooms(self) -> Iterator[tuple[Read, int]]:
        """Its reads, and where in the buffer the room of each begins: of large ones at a block."""
        offset = 0
        for read in sorted(self.reads.values(), key=lambda read: -read.room):
            yield read, offset
            offset += read.room


def aligned(nbytes: int, grain: int = ALIGN) -> int:
    return -(-nbytes // grain) * grain
