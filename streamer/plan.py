"""The plan: opens every input by its headers, checks everything, and says what will be read and written.

It reads no weights, with one exception: to refuse a fine-tuned model that equals the aligned one (or an aligned one
that equals the unaligned), it compares bytes until the first difference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import Fallback
from safeshard.streamer.adapter import WEIGHTS, Adapter, LoraModule, open_adapter
from safeshard.streamer.checkpoint import BUFFERS, FLOATS, SINGLE, Checkpoint, natural, open_checkpoint
from safeshard.streamer.compare import same_tensors
from safeshard.streamer.header import TensorRef, layout
from safeshard.streamer.methods.base import Job
from safeshard.streamer.sources import Source, open_source

Input = Checkpoint | Adapter
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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


class Planner:
    """Opens each input once, however many jobs name it, and collects every offence of every job."""

    def __init__(self) -> None:
        self.offences: list[Offence] = []
        self._opened: dict[tuple[str, ...], Any] = {}

    def plan(self, jobs: Sequence[Job], overwrite: bool) -> list[JobPlan]:
        """Plan all jobs.

        Raises:
            RequestError: some job cannot run; every offence of every job.
        """
        plans = [plan for job in jobs if (plan := self._plan(job)) is not None]
        self.offences += _output_offences(jobs, plans, overwrite)
        if self.offences:
            raise RequestError(list(dict.fromkeys(self.offences)))
        return plans

    def _plan(self, job: Job) -> JobPlan | None:
        inputs: dict[str, Checkpoint | Adapter] = {}
        for role, spec in job.inputs().items():
            base = inputs.get("aligned")
            if not role.endswith("adapter"):
                opened = self._open((spec,), partial(_open_checkpoint, spec))
            elif isinstance(base, Checkpoint):
                opened = self._open((spec, base.source.identity), partial(_open_adapter, spec, base))
            else:
                continue
            if opened is not None:
                inputs[role] = opened
        if inputs.keys() != job.inputs().keys():
            return None
        plan = JobPlan(job, inputs)
        offences = list(_input_offences(plan))
        if not offences:
            (_plan_adapter if isinstance(plan.finetuned, Adapter) else _plan_checkpoint)(plan)
            if not job.writes_model:
                plan.files, plan.copies, plan.fallbacks = [], [], []
            offences = list(self._equal_offences(plan))
        self.offences += offences
        return None if offences else plan

    def _open(self, key: tuple[str, ...], opener: Callable[[], Input]) -> Input | None:
        if key not in self._opened:
            try:
                self._opened[key] = opener()
            except RequestError as error:
                self.offences += error.offences
                self._opened[key] = None
        return self._opened[key]  # type: ignore[no-any-return]

    def _equal_offences(self, plan: JobPlan) -> Iterator[Offence]:
        pairs: dict[str, list[tuple[Weight, Weight]]] = {}
        for module in plan.modules.values():
            if module.aligned and module.unaligned:
                pairs.setdefault("unaligned", []).append((module.aligned, module.unaligned))
            if module.aligned and isinstance(module.finetuned, Weight):
                pairs.setdefault("finetuned", []).append((module.aligned, module.finetuned))
        for role, weights in pairs.items():
            other = plan.inputs[role]
            key = ("equal", plan.aligned.source.identity, other.source.identity)
            if key not in self._opened:
                self._opened[key] = same_tensors([((a.source, a.ref), (b.source, b.ref)) for a, b in weights])
            if self._opened[key]:
                yield Offence(
                    other.source.spec, "", "weights that differ from --aligned", "the same weights", f"check --{role}"
                )


def _open_checkpoint(spec: str) -> Checkpoint:
    return open_checkpoint(open_source(spec))


def _open_adapter(spec: str, base: Checkpoint) -> Adapter:
    return open_adapter(open_source(spec), base)


def _input_offences(plan: JobPlan) -> Iterator[Offence]:
    """Offences that the headers of one job's inputs show against each other."""
    aligned, finetuned, safe = plan.aligned, plan.finetuned, plan.safe
    for role, other in plan.inputs.items():
        if role == "aligned":
            continue
        if isinstance(other, Checkpoint):
            if other.source.identity == aligned.source.identity:
                yield Offence(other.source.spec, "", "another checkpoint than --aligned", "the same", f"check --{role}")
            yield from _shape_offences(aligned, other)
    modules = list(finetuned.modules) if isinstance(finetuned, Adapter) else list(aligned.linears)
    for checkpoint in (c for c in plan.inputs.values() if isinstance(c, Checkpoint)):
        yield from checkpoint.treatable(
            modules if checkpoint is aligned or plan.job.gated or checkpoint is finetuned else ()
        )
        for module in modules:
            weight = aligned.weight(module)
            if weight is not None and checkpoint.weight(module) is None:
                yield checkpoint.offence(
                    weight.name, "a weight of the aligned model", "missing", "use a matching checkpoint"
                )
    if isinstance(finetuned, Checkpoint):
        if not modules:
            yield Offence(aligned.source.spec, "", "decoder layers with 2-D weights", "none", "check the checkpoint")
        yield from aligned.untreatable_tensors()
        for checkpoint in (c for c in (finetuned, safe) if isinstance(c, Checkpoint)):
            yield from _name_offences(aligned, checkpoint)
    yield from plan.job.check(finetuned, safe)


def _shape_offences(aligned: Checkpoint, other: Checkpoint) -> Iterator[Offence]:
    for name, ref in aligned.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None or theirs.shape == ref.shape:
            continue
        remedy = "use checkpoints of one architecture"
        if theirs.shape[1:] == ref.shape[1:] and ("embed" in name or "wte" in name or "lm_head" in name):
            remedy = (
                "the vocabularies differ (padded, or with added tokens): resize the embeddings to one vocabulary first"
            )
        yield other.offence(name, f"{list(ref.shape)}, as in {aligned.source.spec}", str(list(theirs.shape)), remedy)


def _name_offences(aligned: Checkpoint, other: Checkpoint) -> Iterator[Offence]:
    remedy = "use checkpoints of one architecture"
    for name in sorted(aligned.tensors.keys() - other.tensors.keys(), key=natural):
        if not BUFFERS.fullmatch(name) and not (other.tied and name == "lm_head.weight"):
            yield other.offence(name, f"every tensor of {aligned.source.spec}", "missing", remedy)
    for name in sorted(other.tensors.keys() - aligned.tensors.keys(), key=natural):
        if not BUFFERS.fullmatch(name) and not (aligned.tied and name == "lm_head.weight"):
            yield other.offence(name, f"no tensor that {aligned.source.spec} lacks", "an extra tensor", remedy)


def _plan_adapter(plan: JobPlan) -> None:
    job, adapter, safe = plan.job, plan.finetuned, plan.safe
    assert isinstance(adapter, Adapter)
    pairs = safe.modules if isinstance(safe, Adapter) else {}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    ranks = {}
    for name, lora in adapter.modules.items():
        other = pairs.get(name)
        parts = job.parts(lora, other)
        rank = max(parts.values(), default=lora.rank)
        ranks[adapter.own_name(name)] = rank
        for part, ref in (("a", lora.a), ("b", lora.b)):
            shape = (rank, ref.shape[1]) if part == "a" else (ref.shape[0], rank)
            tensors.append((ref.name, _dtype(job, ref.dtype), shape))
            if part not in parts:
                plan.copies.append(Copy(ref.name, adapter.source, ref))
        plan.modules[name] = ModulePlan(
            name,
            Pair(adapter.source, lora),
            Pair(safe.source, other) if other and isinstance(safe, Adapter) else None,
            _weight(plan.aligned, name) if job.gated else None,
            _weight(plan.inputs["unaligned"], name) if job.gated else None,
            {part: (lora.a if part == "a" else lora.b).name for part in parts},
        )
    for ref in adapter.saved.values():
        tensors.append((ref.name, _dtype(job, ref.dtype), ref.shape))
        plan.copies.append(Copy(ref.name, adapter.source, ref))
    plan.files = [_output_file(WEIGHTS, tensors)]
    plan.expected = adapter.expected
    plan.adapter_config = job.adapter_config(adapter, ranks)
    plan.fallbacks += _adapter_fallbacks(adapter, safe if isinstance(safe, Adapter) else None)


def _adapter_fallbacks(adapter: Adapter, safe: Adapter | None) -> Iterator[Fallback]:
    for each in filter(None, (adapter, safe)):
        if each.renamed:
            yield Fallback(
                asked="module names of the checkpoint", done=each.renamed, why=f"{each.source.spec} names them so"
            )
    if safe is None:
        return
    for name in adapter.modules.keys() - safe.modules.keys():
        yield Fallback(
            asked="a safe delta", done="a zero delta", why="the safe adapter has no such module", subject=name
        )
    for name in safe.modules.keys() - adapter.modules.keys():
        why = "the fine-tuned adapter has no such module"
        yield Fallback(asked="a fine-tuned delta", done="a zero delta: the module stays aligned", why=why, subject=name)


def _plan_checkpoint(plan: JobPlan) -> None:
    job, aligned, tuned, safe = plan.job, plan.aligned, plan.finetuned, plan.safe
    assert isinstance(tuned, Checkpoint)
    floats = {
        n.removesuffix(".weight"): r for n, r in aligned.tensors.items() if r.dtype in FLOATS and n in tuned.tensors
    }
    treated = {n: floats[n] for n in sorted(floats, key=natural)} if job.edits_all else aligned.linears
    for name, ref in treated.items():
        plan.modules[name] = ModulePlan(
            name,
            _tensor(tuned, ref.name),
            _tensor(safe, ref.name) if isinstance(safe, Checkpoint) else None,
            _tensor(aligned, ref.name),
            _tensor(plan.inputs["unaligned"], ref.name) if job.gated else None,
            {"weight": ref.name},
        )
    edited = {ref.name for ref in treated.values()}
    shards: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, ref in aligned.tensors.items():
        file = ref.file if len(aligned.files) > 1 else SINGLE
        shards.setdefault(file, []).append((name, _dtype(job, ref.dtype), ref.shape))
        if name not in edited:
            origin = tuned if name in tuned.tensors else aligned
            plan.copies.append(Copy(name, origin.source, origin.tensors[name]))
            if origin is aligned:
                why = f"{tuned.source.spec} lacks it; it is a buffer or a tied weight"
                plan.fallbacks.append(
                    Fallback(asked="the fine-tuned tensor", done="the aligned one", why=why, subject=name)
                )
    for name in sorted(tuned.tensors.keys() - aligned.tensors.keys()):
        why = "the aligned checkpoint lacks it; it is a buffer or a tied weight"
        plan.fallbacks.append(Fallback(asked="the fine-tuned tensor", done="left out", why=why, subject=name))
    plan.files = [_output_file(file, tensors) for file, tensors in sorted(shards.items())]
    plan.expected = len(treated)


def _weight(checkpoint: Checkpoint | Adapter, module: str) -> Weight:
    assert isinstance(checkpoint, Checkpoint)
    ref = checkpoint.weight(module)
    assert ref is not None
    return Weight(checkpoint.source, ref, checkpoint.stores_transposed and ref.name.startswith(module))


def _tensor(checkpoint: Checkpoint | Adapter, name: str) -> Weight:
    assert isinstance(checkpoint, Checkpoint)
    transposed = checkpoint.stores_transposed and name.removesuffix(".weight") in checkpoint.linears
    return Weight(checkpoint.source, checkpoint.tensors[name], transposed)


def _dtype(job: Job, dtype: str) -> str:
    return DTYPES[job.dtype] if job.dtype and dtype in FLOATS else dtype


def _output_file(name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> OutputFile:
    header, refs = layout(name, list(tensors), {"format": "pt"})
    return OutputFile(name, header, refs)


def _output_offences(jobs: Sequence[Job], plans: Sequence[JobPlan], overwrite: bool) -> Iterator[Offence]:
    seen: set[Path] = set()
    need: dict[Path, int] = {}
    sizes = {id(plan.job): plan.bytes_to_write for plan in plans}
    for job in jobs:
        if not job.writes_model:
            continue
        path = job.output.absolute()
        if path in seen:
            yield Offence("--output", str(job.output), "a folder of its own for each job", "named twice", "rename one")
        seen.add(path)
        if path.exists() and not overwrite:
            yield Offence(
                "--output",
                str(job.output),
                "a folder that does not exist",
                "it exists",
                "choose another, or --overwrite",
            )
        elif path.exists() and not _replaceable(path):
            got = "something that safeshard did not write"
            yield Offence(
                "--output", str(job.output), "an output of safeshard, to overwrite", got, "remove it yourself"
            )
        parent = next(p for p in path.parents if p.exists())
        if not parent.is_dir():
            yield Offence("--output", str(job.output), "a folder to write in", f"{parent} is a file", "choose another")
        else:
            need[parent] = need.get(parent, 0) + sizes.get(id(job), 0)
    for parent, nbytes in need.items():
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            yield Offence(
                "--output", str(parent), f"{nbytes} bytes of free space", f"{free}", "free some, or choose another disk"
            )


def _replaceable(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (not any(path.iterdir()) or (path / "manifest.json").is_file())
