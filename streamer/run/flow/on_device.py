"""A step's tensors on the compute device: weights and deltas of what was loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
from torch import Tensor

from safeshard.kernels.alignment.coded import Coded
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.expert_lora import read_ref, view_of
from safeshard.streamer.inputs.layouts import Part
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.methods.base import Lora
from safeshard.streamer.plan.job_plan import Pair, Weight
from safeshard.streamer.sources import Source
from safeshard.streamer.write.finite import refuse_not_finite


class Inputs:
    """A step's tensors on the compute device, each moved once."""

    def __init__(self, loaded: Mapping[Hashable, Tensor], device: torch.device) -> None:
        self._loaded, self.device = loaded, device
        self._moved: dict[Hashable, Tensor] = {}
        self._decoded: dict[Hashable, Tensor] = {}
        self._finite: set[Hashable] = set()

    @property
    def on_device(self) -> bool:
        return self.device.type == "cuda"

    def refuse_not_finite(self, reads: Iterable[Read]) -> None:
        """Look for NaN and infinity, in each tensor once.

        Raises:
            RunError: there is one; it names the tensor.
        """
        new = {read.key: read for read in reads if read.key not in self._finite}
        refuse_not_finite((read, self.tensor(read)) for read in new.values())
        self._finite |= new.keys()

    def tensor(self, read: Read) -> Tensor:
        if read.key not in self._moved:
            self._moved[read.key] = self._loaded[read.key].to(self.device, non_blocking=True)
        return self._moved[read.key]

    def weight(self, place: Weight) -> Tensor:
        """A weight as O x I, whatever its storage."""
        seen = [part.view.of(self.matrix(place.source, part)) for part in place.stored.parts]
        return seen[0] if len(seen) == 1 else self._once(place.key, lambda: torch.cat(seen))

    def operand(self, place: Weight) -> Tensor | Coded:
        """A weight for a gate: in its codes, if that can be, so that it is decoded where it is multiplied with."""
        if not place.stored.in_codes:
            return self.weight(place)
        return place.stored.parts[0].coded(lambda ref: self.tensor(Read(place.source, ref)))

    def matrix(self, source: Source, part: Part) -> Tensor:
        """All that lies in a part's region, as it is stored, decoded once."""

        def load(ref: TensorRef) -> Tensor:
            return self.tensor(Read(source, ref))

        if part.codec is None:
            return part.matrix(load)
        return self._once((source.identity, part.block), lambda: part.matrix(load))

    def _once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._decoded:
            self._decoded[key] = make()
        return self._decoded[key]

    def delta(self, place: Pair | Weight) -> Lora | Tensor:
        """A fine-tuned or safe delta's pair, or weight (O x I)."""
        if isinstance(place, Weight):
            return self.weight(place)
        refs = (place.lora.a, place.lora.b)
        a, b = (view_of(ref).of(self.tensor(Read(place.source, read_ref(ref)))).contiguous() for ref in refs)
        return Lora(a, b, place.lora.scaling)
