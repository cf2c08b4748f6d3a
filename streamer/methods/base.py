"""What every method shares: a job is frozen options plus a function from a module's tensors to new tensors.

A method knows no files. The plan asks it which inputs it takes, what it writes and whether headers suit it; the runner
hands it one `Module` at a time and writes the `Edit` it returns.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import Decision
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.expert_lora import Packing
from safeshard.streamer.inputs.matching import LoraModule
from safeshard.streamer.options import Dtype, Options, Output, Place, Repository

if TYPE_CHECKING:  # nobody waits for torch to read a method's options
    import torch
    from torch import Tensor

    from safeshard.kernels.calibrated.factor import Factor
    from safeshard.kernels.calibrated.grams import Grams
    from safeshard.kernels.merge import Sum

ROLES = ("aligned", "unaligned", "adapter", "finetuned", "safe_adapter", "safe")
# A cosine this close to the threshold is marked in the manifest: the published codes, which round it to five decimals,
# could decide otherwise, and so could another device within 1e-6.
NEAR = 1e-5


@dataclass(frozen=True)
class Lora:
    """delta = scaling * b @ a; a is r x I, b is O x r, in the adapter's dtype."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Module:
    """One module's inputs on the compute device. Weights are O x I, in their checkpoint's dtype.

    `finetuned` and `safe` are pairs for adapters and weights for full checkpoints; `safe` is None where the safe
    adapter has no such module, `unaligned` where the gate alone needs it. `cosine` (NaN where undefined) and
    `projected` (P B for a pair, P delta for a weight, fp32) are the gate's. `chosen` is set where the decision needed
    the cosines of all modules first. `factor` is Safe Delta's; where its Gram has none, `note` says why. `grams` are
    ridge's. `strength` is what was found for `target_leak`.
    """

    name: str
    finetuned: Lora | Tensor
    aligned: Tensor | None = None
    unaligned: Tensor | None = None
    safe: Lora | Tensor | None = None
    projected: Tensor | None = None
    cosine: float | None = None
    chosen: bool | None = None
    factor: Factor | None = None
    grams: Grams | None = None
    strength: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Edit:
    """What becomes of a module: its new tensors ("a" and "b", or "weight"), and the manifest's fields about it.

    A tensor may come as its row tiles, or as a sum that is still to be formed.
    """

    decision: Decision
    tensors: Mapping[str, Tensor | Sum | Iterator[Tensor]]
    fields: Mapping[str, Any] = field(default_factory=dict)


class Job(Options):
    """One defended output: a method, its options, its inputs and its output folder."""

    method: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    gated: ClassVar[bool] = False
    takes_unaligned: ClassVar[bool] = False  # computes with the unaligned weights, in the gate or in `edit`
    takes_aligned: ClassVar[bool] = False  # computes with the aligned weights of an adapter's modules too
    edits_all: ClassVar[bool] = False  # of a full checkpoint every float tensor, element by element
    keeps_dense_projection: ClassVar[bool] = False  # writes P delta of a full checkpoint
    calibrated: ClassVar[bool] = False  # needs the aligned model's Gram matrices, or their factors
    takes_grams: ClassVar[bool] = False  # the Gram matrices themselves
    measured_by: ClassVar[tuple[str, ...]] = ()  # the options that `measure` goes by
    writes_model: ClassVar[bool] = True
    rescales: ClassVar[bool] = False  # rewrites kept pairs too, to a scaling of 1
    truncates: ClassVar[bool] = False  # takes --rank without --serve too
    keeps_more: ClassVar[str] = ""  # what to choose to keep more of the delta
    grows: ClassVar[str] = "check the inputs"  # what to look at where the delta grew

    aligned: Place = Field(description="aligned model: a folder, hf://org/name@revision, or a URL")
    adapter: Place | None = Field(None, description="fine-tuned LoRA adapter")
    finetuned: Place | None = Field(None, description="fine-tuned full checkpoint, in place of --adapter")
    push: Repository | None = Field(
        None, description="a Hub repository (org/name) to push the output to, private; --output may be left out then"
    )
    public: bool = Field(False, description="with --push: make the repository public")
    output: Output = Field(
        default=None,  # type: ignore[assignment]  # which `_somewhere` makes a place
        description="folder to write, or s3://, gs://, az://, hf://org/name; must not exist (required without --push)",
    )
    dtype: Dtype | None = Field(
        None, description="dtype of the output (default: the aligned checkpoint's, or the adapter's)"
    )
    dequantize: bool = Field(False, description="write quantised weights of a full checkpoint in --dtype, or bfloat16")
    expert_packing: Packing | None = Field(
        None, description="how LoRA on fused experts is packed, where its config does not tell"
    )

    @field_validator("output", mode="before")
    @classmethod
    def _somewhere(cls, value: Any, info: ValidationInfo) -> Any:
        """Where nothing is said of it, the repository that the output is pushed to."""
        if value is not None or not cls.writes_model:
            return value
        if not info.data.get("push"):
            raise PydanticCustomError("nowhere", "a value")
        return f"hf://{info.data['push']}"

    @model_validator(mode="after")
    def _one_input(self) -> Job:
        if (self.adapter is None) == (self.finetuned is None):
            raise ValueError("give either --adapter or --finetuned")
        if self.dequantize and not self.writes_checkpoint:
            raise ValueError(
                "--dequantize goes with an output that is a full checkpoint: an adapter has no such weights"
            )
        pushed = f"hf://{self.push}" if self.push else None
        if pushed and (not self.writes_model or (isinstance(self.output, str) and self.output != pushed)):
            raise ValueError("--push goes with a local --output, or with none")
        if self.public and not (self.afar or "").startswith("hf://"):
            raise ValueError("--public goes with --push")
        return self

    @property
    def afar(self) -> str | None:
        """The URL of the place afar that the output goes to, if it does: in place of a local folder, or besides."""
        return self.output if isinstance(self.output, str) else f"hf://{self.push}" if self.push else None

    def inputs(self) -> dict[str, str]:
        """Role -> source of every input given, in the manifest's vocabulary."""
        return {role: place for role in ROLES if (place := getattr(self, role, None)) is not None}

    def settings(self) -> dict[str, Any]:
        """Options that decide what is written: all but the places."""
        options = json.loads(self.model_dump_json(exclude={*self.inputs(), "output", "push", "public"}))
        return {
            key: value
            for key, value in options.items()
            if key not in ("adapter", "finetuned", "safe_adapter", "safe")
            and (key, value) not in (("expert_packing", None), ("dequantize", False), ("serve", None), ("recipe", None))
            and not (value is None and key in Served.model_fields and key not in type(self).__annotations__)
        }

    @property
    def served_by(self) -> str | None:
        """What is to serve the adapter that is written."""
        return getattr(self, "serve", None)

    @property
    def writes_unit_scaling(self) -> bool:
        """Whether an adapter's pairs are written for a scaling of 1."""
        return self.rescales or self.served_by is not None

    @property
    def dense_scratch(self) -> int:
        """Bytes that `edit` holds at most for each element of a full weight, beside the tiles of its output."""
        return 0

    @property
    def writes_checkpoint(self) -> bool:
        """Whether the output is a full checkpoint."""
        return self.finetuned is not None or getattr(self, "output_format", None) == "checkpoint"

    @property
    def reads_aligned(self) -> bool:
        """Whether `edit` is given the aligned weights."""
        return self.writes_checkpoint or self.takes_aligned

    @property
    def rest_role(self) -> str:
        """Whose tensors to take over where the method does not apply: "finetuned" or "aligned"."""
        return "finetuned"

    @property
    def ranks_first(self) -> bool:
        """Whether all modules' cosines must be known before one is decided."""
        return False

    def choose(self, cosines: Mapping[str, float | None]) -> set[str]:
        """The modules to change, given every module's cosine; asked only where `ranks_first`."""
        raise NotImplementedError

    @property
    def damping(self) -> float | None:
        """At which damping a calibrated job asks for factors; None for what was saved with them."""
        return None

    @property
    def target_leak(self) -> float | None:
        """The share of the delta's energy on safe inputs to let through, where the strength follows from it."""
        return None

    @property
    def strengths(self) -> Sequence[float]:
        """The strengths that `measure` tries, the safest first."""
        raise NotImplementedError

    def measure(self, module: Module) -> list[float]:
        """The energy of a module's delta on safe inputs, and of what is left at each of `strengths`."""
        raise NotImplementedError

    def foresee(self, module: Module, *, measures: bool) -> None:
        """Let what jobs share know beforehand what `measure` or `edit` will ask of it."""

    def measured_like(self) -> Hashable:
        """Equal for jobs whose `measure` finds the same in the same module."""
        return self.method, self.damping, *(getattr(self, option) for option in self.measured_by)

    def check(self, finetuned: Adapter | Checkpoint, safe: Adapter | Checkpoint | None) -> Iterator[Offence]:
        """Offences that the inputs' headers show."""
        yield from ()

    def parts(self, module: LoraModule, safe: LoraModule | None) -> dict[str, int]:
        """Of an adapter's pair, the tensors that this method writes anew ("a", "b") and their rank."""
        return {}

    def adapter_config(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
        """adapter_config.json of the output; `ranks` are the written ranks by the adapter's own module names."""
        return dict(adapter.config.raw)

    def dense_dtype(self, aligned: Tensor) -> torch.dtype:
        """The dtype that a full checkpoint's weight is written in."""
        import torch

        return getattr(torch, self.dtype) if self.dtype else aligned.dtype

    def edit(self, module: Module) -> Edit:
        """Decide about one module and compute its new tensors."""
        raise NotImplementedError


class Served(Options):
    """Of methods that write adapters."""

    serve: Literal["vllm"] | None = Field(
        None, description="write the adapter so that this reads it right: scaling 1, one rank that it takes"
    )
    rank: int | None = Field(None, gt=0, description="with --serve: truncate to this rank (default: exact)")
    output_format: Literal["adapter", "checkpoint"] | None = Field(
        None, description="of an adapter's output: adapter, or checkpoint to merge it (default: adapter)"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Served:
        if self.output_format == "adapter" and getattr(self, "finetuned", None) is not None:
            raise ValueError("a full checkpoint gives a checkpoint: --output-format and --rank go with --adapter")
        if self.rank is not None and self.serve is None and not getattr(self, "truncates", False):
            raise ValueError("--rank goes with --serve")
        return self


class GatedJob(Job):
    """A method that decides by cos(P delta, delta)."""

    gated: ClassVar[bool] = True
    takes_unaligned: ClassVar[bool] = True
    unaligned: Place = Field(description="the base model that `aligned` was trained from")


def product(pair: Lora) -> Tensor:
    """The delta of a pair, O x I fp32."""
    return (pair.b.float() * pair.scaling) @ pair.a.float()


def random_key(seed: int, *names: str) -> int:
    """A 63-bit key that depends on the seed and the names alone."""
    digest = blake2b(json.dumps([seed, *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
