"""What a plan consists of: for each job its modules, what they are computed from, and what is written where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeshard.manifests.errors import RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Caution, Fallback, Manifest
from safeshard.streamer.calibration.factor_files import SavedFactors
from safeshard.streamer.calibration.groups import FactorSource
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.compare import Difference
from safeshard.streamer.inputs.expert_lora import read_ref, view_of
from safeshard.streamer.inputs.layouts import Stored
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.inputs.names.unbuilt import excused
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.layout import Layout
from safeshard.streamer.sources import Source

if TYPE_CHECKING:
    from safeshard.streamer.plan.parts import Part


def _kind(module: str) -> str:
    path, _, last = module.rpartition(".")
    return f"experts.*.{last}" if ".experts." in f"{path}." else last


@dataclass(frozen=True)
class Pair:
    """An adapter's tensors of one module."""

    source: Source
    lora: LoraModule

    @cached_property
    def key(self) -> Hashable:
        """Equal for one place."""
        return tuple((Read(self.source, read_ref(ref)).key, view_of(ref)) for ref in (self.lora.a, self.lora.b))

    def reads(self) -> Iterator[Read]:
        """What is read of it."""
        return iter(self._reads)

    @cached_property
    def _reads(self) -> tuple[Read, ...]:
        return tuple(Read(self.source, read_ref(ref)) for ref in (self.lora.a, self.lora.b))


@dataclass(frozen=True)
class Weight:
    """A checkpoint's weight, wherever it is stored."""

    source: Source
    stored: Stored

    @cached_property
    def key(self) -> Hashable:
        """Equal for one place."""
        return (self.source.identity, self.stored.key)

    def reads(self) -> Iterator[Read]:
        """What is read of it."""
        return iter(self._reads)

    @cached_property
    def _reads(self) -> tuple[Read, ...]:
        return tuple(Read(self.source, ref) for ref in self.stored.refs())


@dataclass(frozen=True)
class ModulePlan:
    """One module of one job: what it is computed from, and where in the output's tensors each part goes.

    `added` are rows that follow what is computed: those that the fine-tuned model's vocabulary has more.
    """

    name: str
    finetuned: Pair | Weight
    safe: Pair | Weight | None
    aligned: Weight | None
    unaligned: Weight | None
    writes: Mapping[str, Stored]
    added: Read | None = None

    @property
    def outputs(self) -> set[str]:
        """The output tensors that it writes to."""
        return {name for stored in self.writes.values() for name in stored.names}

    def tensors(self, job: Job) -> set[str]:
        """Its output tensors: also the A or B of a pair that the method takes over as it is."""
        pair = self.finetuned
        copied = {pair.lora.a.name, pair.lora.b.name} if isinstance(pair, Pair) and not job.writes_checkpoint else set()
        return copied | self.outputs


@dataclass(frozen=True)
class Copy:
    """An output tensor taken over from an input, cast where the dtypes differ; `added` are rows that follow it."""

    name: str
    source: Source
    ref: TensorRef
    added: Read | None = None


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: its header bytes, and each tensor's place in it."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorRef]

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(ref.nbytes for ref in self.tensors.values())


@dataclass(frozen=True)
class SideFile:
    """A small file to take over as `name`. `blake3` is known of local ones; a remote one is read when it is written."""

    name: str
    source: Source
    file: str
    size: int
    blake3: str | None

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            RunError: they cannot be read, or are no longer those that were there at the start.
        """
        data = self.source.read(self.file, 0, self.size)
        if self.blake3 is not None and hash_bytes(data) != self.blake3:
            remedy = "restore it, or run again with the new one and --overwrite"
            raise RunError(f"{self.source.spec}/{self.file} changed underway", remedy)
        return data


@dataclass
class JobPlan:
    """Everything about one job that headers tell."""

    job: Job
    inputs: Mapping[str, Checkpoint | Adapter]
    modules: dict[str, ModulePlan] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    side_files: list[SideFile] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    cautions: list[Caution] = field(default_factory=list)
    expected: int = 0
    adapter_config: dict[str, Any] | None = None
    whole: dict[str, dict[str, Difference]] = field(default_factory=dict)  # by role, of adapters' whole tensors
    factors: FactorSource | None = None
    layout: Layout | None = None  # of a checkpoint that is written
    serve_rank: int | None = None  # of every pair, where an adapter is written to be served
    finished: Manifest | None = None  # of an output that an interrupted batch has completed already
    has_journal: bool = False  # whether an interrupted run left its journal where the output is to be
    part: Part | None = None  # what it is restricted to: a share of the modules and copies
    shared: int = 0  # of how many modules that is a share; where a strength follows from measuring, of those measured

    def sources(self) -> list[Source]:
        """Everything that is read from."""
        factors = [self.factors.source] if isinstance(self.factors, SavedFactors) else []
        return [*(opened.source for opened in self.inputs.values()), *factors]

    @property
    def folder(self) -> Path:
        """Where it is written, of an output that is a folder on this machine."""
        assert isinstance(self.job.output, Path)
        return self.job.output

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

    def linear(self, module: str) -> str:
        """The aligned model's own name of a module's linear: an adapter may call an expert's otherwise."""
        return self.aligned.modules.linear(module)

    def called(self, linear: str) -> Sequence[str]:
        """What this job's modules of one of the aligned model's linears are called."""
        return self._called.get(linear, ())

    @cached_property
    def _called(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.modules:
            found.setdefault(self.linear(name), []).append(name)
        return found

    @cached_property
    def excused(self) -> dict[str, dict[str, str]]:
        """Role -> the aligned model's tensors that this checkpoint may lack and does lack, with the reason."""
        ours, found = self.aligned, {}
        for role, other in self.inputs.items():
            if isinstance(other, Checkpoint) and role != "aligned":
                found[role] = excused(ours.tensors, other.tensors, ours.config, other.config)
        return found

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind of module -> how many are treated, and how many were to be; experts' linears are kinds of their own."""
        targets = self.finetuned.targets if isinstance(self.finetuned, Adapter) else self.modules.keys()
        treated, expected = (Counter(map(_kind, names)) for names in (self.modules, {*targets, *self.modules}))
        return {kind: (treated[kind], count) for kind, count in expected.items()}

    def parts(self, module: LoraModule, safe: LoraModule | None) -> Mapping[str, int]:
        """Of an adapter's pair, the tensors that are written anew ("a", "b") and their rank."""
        if self.serve_rank is not None:
            return {"a": self.serve_rank, "b": self.serve_rank}
        return self.job.parts(module, safe)

    @property
    def rank(self) -> int | None:
        """The highest rank of the adapter that is written."""
        config = self.adapter_config
        return None if config is None else max([config["r"], *(config.get("rank_pattern") or {}).values()])

    @property
    def bytes_to_write(self) -> int:
        return sum(file.nbytes for file in self.files) + sum(file.size for file in self.side_files)
