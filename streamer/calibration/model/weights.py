"""An aligned model's weights as a forward pass takes them: by the names of tensors, decoded; experts one at a time."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.calibration.model.ahead import Room, fresh
from safeshard.streamer.calibration.model.experts import Experts
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.layouts import Part, Stored
from safeshard.streamer.inputs.read import TORCH_DTYPES


@dataclass(frozen=True)
class Expert:
    """One expert's weights, O x I; `gate` is None where it has none."""

    gate: Tensor | None
    up: Tensor
    down: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Expert:
        gate, up, down = (None if w is None else w.to(device).to(dtype) for w in (self.gate, self.up, self.down))
        assert up is not None
        assert down is not None
        return Expert(gate, up, down)


class Weights:
    """Reads a checkpoint's weights. Thread-safe.

    Attributes:
        shapes: tensor -> its shape, of all that lie apart. A quantised weight counts as the matrix that it decodes to.
        bytes_read: so far.
    """

    def __init__(self, aligned: Checkpoint) -> None:
        self._aligned, self._lock = aligned, threading.Lock()
        self.bytes_read = 0
        coded = aligned.encoded_tensors | aligned.beside_encoded
        self.shapes: dict[str, tuple[int, ...]] = {n: ref.shape for n, ref in aligned.tensors.items() if n not in coded}
        encodings = aligned.modules.encodings.items()
        self._encoded = {f"{name}.weight": name for name, found in encodings if len(found.shape) == 2}
        self.shapes |= {tensor: aligned.modules.encodings[name].shape for tensor, name in self._encoded.items()}

    def load(self, name: str, room: Room = fresh) -> Tensor:
        """A tensor by its name, as it is stored, in memory that `room` gives; decoded (fp32) where it is quantised."""
        if name in self._encoded:
            found = self._aligned.modules.find(self._encoded[name])
            assert found is not None
            return self._matrix(found, {})
        return self._read(self._aligned.tensors[name], room)

    def linear(self, experts: Experts, index: int, role: str) -> str:
        """The name of an expert's linear in the checkpoint."""
        return self._aligned.modules.linear(f"{experts.path}.{index}.{role}")

    def expert(self, experts: Experts, index: int) -> Expert:
        """The weights of one expert; a region that holds several of them is read once."""
        regions: dict[Hashable, Tensor] = {}
        gate, up, down = (
            self._matrix(self._stored(experts, index, role), regions) if role in experts.roles else None
            for role in ("gate_proj", "up_proj", "down_proj")
        )
        assert up is not None
        assert down is not None
        return Expert(gate, up, down)

    def nbytes(self, name: str) -> int:
        """What `load` holds of a tensor, its stored form and its decoded one."""
        if name not in self._encoded:
            return self._aligned.tensors[name].nbytes
        found = self._aligned.modules.find(self._encoded[name])
        assert found is not None
        return sum(ref.nbytes for ref in found.refs()) + 4 * found.numel

    def expert_bytes(self, experts: Experts, dtype: torch.dtype) -> int:
        """What one expert holds at most: as stored, decoded, and in the dtype of the forward pass."""
        found = [self._stored(experts, 0, role) for role in experts.roles]
        stored = {part.block: sum(ref.nbytes for ref in part.refs.values()) for each in found for part in each.parts}
        return sum(stored.values()) + sum((4 * each.encoded + dtype.itemsize) * each.numel for each in found)

    def offences(self, experts: Experts) -> Iterator[Offence]:
        """What the checkpoint lacks of a layer's experts by config.json, or has otherwise."""
        remedy = "use the checkpoint that belongs to this config.json"
        for index in range(experts.count):
            for role, expected in experts.roles.items():
                name = f"{experts.path}.{index}.{role}"
                found = self._aligned.modules.find(name)
                if found is None:
                    yield self._aligned.offence(name, "an expert's weight", "none", remedy)
                elif found.shape != expected:
                    got = str(list(found.shape))
                    yield self._aligned.offence(found.name, f"{list(expected)} by config.json for {name}", got, remedy)

    def _stored(self, experts: Experts, index: int, role: str) -> Stored:
        found = self._aligned.modules.find(f"{experts.path}.{index}.{role}")
        assert found is not None
        return found

    def _matrix(self, stored: Stored, regions: dict[Hashable, Tensor]) -> Tensor:
        def region(part: Part) -> Tensor:
            if part.block not in regions:
                regions[part.block] = part.matrix(self._read)
            return regions[part.block]

        seen = [part.view.of(region(part)) for part in stored.parts]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def _read(self, ref: TensorRef, room: Room = fresh) -> Tensor:
        tensor = room(ref.nbytes)
        self._aligned.source.readinto(ref.file, ref.offset, tensor.numpy().data)
        with self._lock:
            self.bytes_read += ref.nbytes
        return tensor.view(TORCH_DTYPES[ref.dtype]).view(ref.shape)
