"""What a plan consists of: for each job its modules, what they are computed from, and what is written where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Fallback, Manifest
from safeshard.streamer.calibration.groups import FactorSource
from safeshard.streamer.inputs.adapter import Adapter, LoraModule
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.methods.base import Job
from safeshard.streamer.sources import Source


@dataclass(frozen=True)
class Pair:
    """An adapter's tensors of one module."""

    source: Source
    lora: LoraModule


@dataclass(frozen=True)
class Weight:
    """A checkpoint's tensor; `transposed` where it is stored in x out."""

    source: Source
    ref: TensorRef
    transposed: bool = False


@dataclass(frozen=True)
class ModulePlan:
    """One module of one job: what it is computed from, and the output tensor of each part it writes."""

    name: str
    finetuned: Pair | Weight
    safe: Pair | Weight | None
    aligned: Weight | None
    unaligned: Weight | None
    writes: Mapping[str, str]


@dataclass(frozen=True)
class Copy:
    """An output tensor taken over from an input, cast where the dtypes differ."""

    name: str
    source: Source
    ref: TensorRef


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: its header bytes, and each tensor's place in it."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorRef]

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(ref.nbytes for ref in self.tensors.values())


@dataclass
class JobPlan:
    """Everything about one job that headers tell."""

    job: Job
    inputs: Mapping[str, Checkpoint | Adapter]
    modules: dict[str, ModulePlan] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    expected: int = 0
    adapter_config: dict[str, Any] | None = None
    factors: FactorSource | None = None
    finished: Manifest | None = None  # of an output that an interrupted batch has completed already

    @property
    def aligned(self) -> Checkpoint:
        checkpoint = self.inputs["aligned"]
        assert isinstance(checkpoint, Checkpoint)
        return checkpoint

    @property
    def finetuned(self) -> Checkpoint | Adapter:
        return self.inputs["adapter" if "adapter" in self.inputs else "finetuned"]

    @property
    def safe(self) -> Checkpoint | Adapter | None:
        return self.inputs.get("safe_adapter") or self.inputs.get("safe")

    @property
    def bytes_to_write(self) -> int:
        return sum(file.nbytes for file in self.files)
