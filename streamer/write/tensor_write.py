"""One tensor, or a region of one, on its way to its place in a safetensors file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from blake3 import blake3
from torch import Tensor

from safeshard.streamer.disk import clear_errors, write_all
from safeshard.streamer.inputs.read import TORCH_DTYPES
from safeshard.streamer.write.finite import NotFiniteError, all_finite

if TYPE_CHECKING:
    from safeshard.streamer.write.writer import Writer

PIECE = 1 << 18  # elements written at a time: they pass the check, the hash and the disk in a core's cache


class TensorWrite:
    """One output tensor on its way to the disk, or a region of one of `count` elements from the `start`-th on.

    Each piece is checked, hashed and written while it is in cache.
    """

    def __init__(self, writer: Writer, name: str, start: int = 0, count: int | None = None) -> None:
        self._writer, self._name = writer, name
        self._ref = writer.place(name)
        self._begin = self._ref.offset + start * self._ref.item_bytes
        self._nbytes = self._ref.nbytes if count is None else count * self._ref.item_bytes
        self._fd, self._offset, self._hash = writer._parts.fd(name), self._begin, blake3()

    def add_tensor(self, tensor: Tensor) -> None:
        """Write a tensor of any size; raises as `Writer.write` does."""
        if tensor.is_cuda:  # in one copy
            tensor = tensor.to(TORCH_DTYPES[self.dtype]).cpu()
        for piece in torch.split(tensor.reshape(-1), PIECE):
            self.add(piece)

    @property
    def dtype(self) -> str:
        """The dtype that is written, as safetensors names it."""
        return self._ref.dtype

    def add(self, piece: Tensor) -> None:
        """Write what follows in row-major order; raises as `Writer.write` does."""
        output = self._writer.output
        host = piece.to("cpu", TORCH_DTYPES[self.dtype]).contiguous()
        if not all_finite(host):
            problem = "is not finite" if not bool(torch.isfinite(piece).all()) else f"does not fit {self._ref.dtype}"
            remedy = "check the inputs, or choose another --dtype"
            raise NotFiniteError(f"{output}: the new {self._name} {problem}", remedy)
        data = host.reshape(-1).view(torch.uint8).numpy().data
        with clear_errors(self._writer._here):
            write_all(self._fd, data, self._offset)
        start = time.perf_counter()
        if self._nbytes == self._ref.nbytes:  # a region's would be of no use
            self._hash.update(data)
        self._writer.clock.add("hash", start)
        self._offset += len(data)

    def finish(self) -> None:
        """Note the tensor as written. All its pieces must be."""
        assert self._offset == self._begin + self._nbytes, f"{self._name}: pieces of another size"
        self._writer._parts.begin_writeback(self._fd, self._begin, self._nbytes)
        if self._nbytes == self._ref.nbytes:
            self._writer._finished(self._name, self._hash.hexdigest(), self._nbytes)
        else:
            self._writer._finished_region(self._name, self._nbytes)
