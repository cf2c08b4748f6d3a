"""Output tensors that many modules write into: each module's rows and columns, put in place region by region.

A module that has a region to itself is written as it comes. Where modules share one (gate and up of an expert, stored
transposed or in turns, or a quantised block of both), the region is held until all of them are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safeshard.streamer.inputs.codecs.base import Encoded, reencode
from safeshard.streamer.inputs.layouts import Part, Stored, View
from safeshard.streamer.inputs.read import TORCH_DTYPES
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.write.finite import NotFiniteError, all_finite
from safeshard.streamer.write.writer import Writer

Key = tuple[str, str, int]  # module, part of its edit, number of the stored part
Known = Callable[[Part], Sequence[Mapping[str, Tensor]]]


@dataclass
class _Region:
    """A region under way: its matrix, and the modules that are still to come."""

    matrix: Tensor
    left: set[Key]


@dataclass
class Assembler:
    """Writes what modules give into the tensors of one output. Thread-safe."""

    writer: Writer
    sharing: Mapping[Hashable, frozenset[Key]]
    _regions: dict[Hashable, _Region] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, plan: JobPlan, writer: Writer) -> Assembler:
        """The assembler of a plan's modules."""
        sharing: dict[Hashable, set[Key]] = {}
        for name, module in plan.modules.items():
            for what, stored in module.writes.items():
                for number, part in enumerate(stored.parts):
                    sharing.setdefault(part.block, set()).add((name, what, number))
        return cls(writer, {block: frozenset(keys) for block, keys in sharing.items()})

    def write(
        self, module: str, what: str, stored: Stored, rows: Tensor | Iterable[Tensor], known: Known
    ) -> list[Encoded]:
        """Write a module's new matrix, whole or as row tiles, O x I; return what was encoded, of regions now complete.

        `known` gives the parts of quantised weights that blocks may be taken from as they are.

        Raises:
            NotFiniteError: it holds NaN or infinity, or a value that the planned dtype cannot hold.
            RunError: writing failed.
        """
        tiles = iter([rows] if isinstance(rows, Tensor) else rows)
        pieces = [tiles]
        if len(stored.parts) > 1:
            matrix = torch.cat(list(tiles))
            pieces = [iter([piece]) for piece in torch.split(matrix, [part.shape[0] for part in stored.parts])]
        written = [
            self._write_part((module, what, number), part, piece, known)
            for number, (part, piece) in enumerate(zip(stored.parts, pieces, strict=True))
        ]
        return [encoded for encoded in written if encoded is not None]

    def _write_part(self, key: Key, part: Part, tiles: Iterator[Tensor], known: Known) -> Encoded | None:
        if part.codec is None and part.view == View():
            self._store(part, "values", part.stored[0] * part.stored[1], tiles)
            return None
        with self._lock:
            region = self._regions.get(part.block)
            if region is None:
                dtype = TORCH_DTYPES[self.writer.place(part.name).dtype] if part.codec is None else torch.float32
                matrix = torch.empty(part.stored, dtype=dtype)
                region = self._regions[part.block] = _Region(matrix, set(self.sharing[part.block]))
        seen, start = part.view.of(region.matrix), 0
        for tile in tiles:
            seen[start : start + len(tile)].copy_(tile)
            start += len(tile)
        with self._lock:
            region.left.discard(key)
            complete = not region.left
            if complete:
                del self._regions[part.block]
        if not complete:
            return None
        if part.codec is None:
            self._store(part, "values", region.matrix.numel(), iter([region.matrix]))
            return None
        if not all_finite(region.matrix):
            remedy = "check the inputs"
            raise NotFiniteError(f"{self.writer.output}: the new {key[0]} is not finite", remedy)
        encoded = reencode(part.codec, region.matrix, known(part))
        for each, tensor in encoded.stored.items():
            self._store(part, each, tensor.numel(), iter([tensor]))
        return encoded

    def _store(self, part: Part, each: str, count: int, tiles: Iterator[Tensor]) -> None:
        """Write what belongs in the region of one of a part's tensors."""
        ref = part.refs[each]
        under_way = self.writer.begin(ref.name, part.start(each) // ref.item_bytes, count)
        for tile in tiles:
            under_way.add_tensor(tile)
        under_way.finish()
