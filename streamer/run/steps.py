"""Steps: what is to be done, module by module for all jobs together, so that each tensor is read once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from safeshard.kernels.dense import PIECE, ROWS
from safeshard.kernels.projection import LANES
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.read import Read, Step
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, Pair, Weight
from safeshard.streamer.tensor_names import layer_of, natural
from safeshard.streamer.write.writer import Writer

STRIP_BYTES = 16 << 20  # what the gate's tiles and a reader's small buffers may take, and a strip of a large tensor
DEVICE_WORKERS = 4  # one copies to the device, one computes, one copies back, one hashes and writes
DENSE_COLUMNS = 1024  # columns of a full delta that the gate treats at once


@dataclass
class JobRun:
    """One job under way: its plan, its writer (None for a score), and what was decided so far."""

    plan: JobPlan
    writer: Writer | None = None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    cosines: dict[str, float | None] = field(default_factory=dict)
    chosen: set[str] | None = None
    limit: float | None = None  # the highest cosine among the chosen
    fallbacks: list[Fallback] = field(default_factory=list)

    @property
    def job(self) -> Job:
        return self.plan.job

    def is_done(self, module: str) -> bool:
        """Whether this pass has nothing left to do for a module."""
        if self.writer is None or (self.job.ranks_first and self.chosen is None):
            return module in self.cosines
        return module in self.entries

    def choose(self) -> None:
        """Let the job choose among its modules, once all cosines are known."""
        self.chosen = self.job.choose(self.cosines)
        self.limit = max((c for name in self.chosen if (c := self.cosines[name]) is not None), default=None)

    def score(self, module: str, cosine: float | None) -> None:
        """Keep a module's cosine (None: undefined), also in the journal where a later pass needs it."""
        self.cosines[module] = cosine
        if self.writer and self.job.ranks_first:
            self.writer.record("cosine", name=module, cosine=cosine)

    def decide(self, module: str, entry: dict[str, Any]) -> None:
        """Keep a module's manifest entry, also in the journal."""
        self.entries[module] = entry
        if self.writer:
            self.writer.record("module", entry=entry)

    def fall_back(self, fallback: Fallback) -> None:
        """Keep what was done otherwise than asked, also in the journal."""
        self.fallbacks.append(fallback)
        if self.writer:
            self.writer.record("fallback", entry=fallback.model_dump(mode="json", exclude_none=True))

    def has_factor(self, module: str) -> bool:
        """Whether a module is served in the calibrated pass."""
        return self.plan.factors is not None and module in self.plan.factors.modules

    def untreated(self) -> dict[str, str]:
        """The modules that a factor was due for and that have none, kept aligned, and why."""
        return {
            name: entry.get("note", "")
            for name, entry in self.entries.items()
            if entry["decision"] == "reverted" and self.has_factor(name)
        }

    def needs_gate(self, module: str) -> bool:
        """Whether this pass computes a module's gate: not where ranking has already left it alone."""
        return self.job.gated and (self.chosen is None or module in self.chosen)


@dataclass(frozen=True)
class ModuleTask:
    """One module of one job."""

    run: JobRun
    plan: ModulePlan

    def reads(self) -> Iterator[Read]:
        yield from _reads(self.plan.finetuned)
        yield from _reads(self.plan.safe)
        if self.run.needs_gate(self.plan.name) or self.run.job.writes_checkpoint:
            yield from _reads(self.plan.aligned)
        if self.run.needs_gate(self.plan.name):
            yield from _reads(self.plan.unaligned)

    @property
    def gate_key(self) -> tuple[Hashable, ...]:
        """Equal for tasks with one gate: aligned, unaligned and fine-tuned tensors."""
        places = (self.plan.aligned, self.plan.unaligned, self.plan.finetuned)
        return tuple(tuple(read.key for read in _reads(place)) for place in places)


@dataclass(frozen=True)
class CopyTask:
    """One tensor taken over from an input; `cast` where its dtype changes."""

    run: JobRun
    copy: Copy
    cast: bool

    def reads(self) -> Iterator[Read]:
        if self.cast:
            yield Read(self.copy.source, self.copy.ref)


def module_steps(runs: Sequence[JobRun]) -> list[Step]:
    """Steps for all modules that are not done, a step a module, layer by layer."""
    runs_of: dict[str, list[JobRun]] = {}
    for job_run in runs:
        for name in job_run.plan.modules:
            if not job_run.has_factor(name):
                runs_of.setdefault(name, []).append(job_run)
    steps = [module_step(name, [(r, name) for r in runs_of[name]]) for name in sorted(runs_of, key=_order)]
    return [step for step in steps if step.tasks]


def module_step(name: str, wanted: Iterable[tuple[JobRun, str]]) -> Step:
    """One step for modules of jobs that share tensors; what is done is left out."""
    tasks = [ModuleTask(r, r.plan.modules[m]) for r, m in wanted if m in r.plan.modules and not r.is_done(m)]
    if tasks and all(t.run.job.edits_all and isinstance(t.plan.finetuned, Weight) for t in tasks):
        return _elementwise(name, tasks)
    step = Step(name, {read.key: read for task in tasks for read in task.reads()}, [*tasks])
    step.scratch = STRIP_BYTES + max(map(_scratch, tasks), default=0) + sum(map(_projected, tasks))
    return step


def _elementwise(name: str, tasks: Sequence[ModuleTask | CopyTask]) -> Step:
    """A step whose tensors are read strip by strip."""
    reads = {read.key: read for task in tasks for read in task.reads()}
    nbytes = sum(read.ref.nbytes for read in reads.values())
    scratch = 4 * 4 * PIECE + min(nbytes, len(reads) * STRIP_BYTES)  # pieces in fp32, and strips
    return Step(name, {}, [*tasks], scratch=scratch, copied=nbytes, strips=True)


def copy_steps(runs: Sequence[JobRun]) -> list[Step]:
    """Steps for the tensors that are taken over and not yet written."""
    steps = []
    for job_run in runs:
        dtypes = {name: ref.dtype for file in job_run.plan.files for name, ref in file.tensors.items()}
        for copy in job_run.plan.copies:
            if job_run.writer is None or copy.name not in job_run.writer.hashes:
                task = CopyTask(job_run, copy, cast=dtypes[copy.name] != copy.ref.dtype)
                steps.append(
                    _elementwise(copy.name, [task])
                    if task.cast
                    else Step(copy.name, {}, [task], copied=copy.ref.nbytes)
                )
    return steps


def workers_for(device: torch.device) -> int:
    """Compute threads: one a core, each with single-threaded torch; or, for a CUDA device, each with its own stream."""
    return DEVICE_WORKERS if device.type == "cuda" else len(os.sched_getaffinity(0))


def _order(name: str) -> tuple[float, Any]:
    layer = layer_of(name)
    return (float("inf") if layer is None else layer, natural(name))


def _reads(place: Pair | Weight | None) -> Iterator[Read]:
    if isinstance(place, Pair):
        yield Read(place.source, place.lora.a)
        yield Read(place.source, place.lora.b)
    elif place is not None:
        yield Read(place.source, place.ref)


def _projected(task: ModuleTask) -> int:
    """Host bytes of a gate's fp32 copies of B, of V^T B, and of the projected B, which is held until the step ends."""
    finetuned = task.plan.finetuned
    if not isinstance(finetuned, Pair) or not task.run.job.gated:
        return 0
    rank = -(-finetuned.lora.rank // LANES) * LANES
    return 4 * rank * (4 * finetuned.lora.b.shape[0] + finetuned.lora.a.shape[1])


def _scratch(task: ModuleTask) -> int:
    """Host bytes that computing and writing one task adds to its inputs, at most."""
    job, finetuned = task.run.job, task.plan.finetuned
    if job.writes_checkpoint:
        weight = task.plan.aligned or finetuned
        assert isinstance(weight, Weight)
        rows, columns = weight.ref.shape[:: -1 if weight.transposed else 1] if len(weight.ref.shape) == 2 else (1, 0)
        whole = job.dense_scratch + 4 * weight.transposed  # a weight stored in x out is put together from its tiles
        tiles = 4 * 4 * min(rows, ROWS) * columns
        return whole * weight.ref.numel + tiles + (_gate_scratch(weight) if job.gated else 0)
    if isinstance(finetuned, Weight):
        return _gate_scratch(finetuned)
    return 3 * 4 * (finetuned.lora.a.shape[1] + finetuned.lora.b.shape[0]) * _written_rank(task)


def _gate_scratch(weight: Weight) -> int:
    """Of a full delta's gate: some columns of it and of its products, and V V^T where that is the smaller way."""
    rows, columns = weight.ref.shape[:: -1 if weight.transposed else 1]
    return 4 * rows * (4 * min(columns, DENSE_COLUMNS) + (rows if rows < columns else 0))


def _written_rank(task: ModuleTask) -> int:
    finetuned, safe = task.plan.finetuned, task.plan.safe
    assert isinstance(finetuned, Pair)
    parts = task.run.job.parts(finetuned.lora, safe.lora if isinstance(safe, Pair) else None)
    return max(parts.values(), default=finetuned.lora.rank)
