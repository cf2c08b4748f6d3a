"""Steps: what is to be done, module by module for all jobs together, so that each tensor is read once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from safeshard.kernels.alignment.stacks import LANES
from safeshard.kernels.dense import PIECE, ROWS
from safeshard.kernels.effect import ELEMENTS
from safeshard.streamer.inputs.read import Step
from safeshard.streamer.plan.job_plan import Pair, Weight
from safeshard.streamer.run.flow.bundles import BUNDLE_BYTES, bundles, bytes_apart
from safeshard.streamer.run.flow.tasks import CopyTask, JobRun, ModuleTask
from safeshard.streamer.sources.direct import BLOCK
from safeshard.streamer.tensor_names import layer_of, natural
from safeshard.streamer.write.part_files import CHUNK_BYTES

STRIP_BYTES = 16 << 20  # what the gate's tiles and a reader's small buffers may take, and a strip of a large tensor
COPY_BYTES = 2 * CHUNK_BYTES + 4 * BLOCK  # of a tensor that is taken over, two pieces: one is read, one is written
DEVICE_WORKERS = 4  # one copies to the device, one computes, one copies back, one hashes and writes
DENSE_COLUMNS = 1024  # columns of a full delta that the gate treats at once


def module_steps(runs: Sequence[JobRun], apart: int = BUNDLE_BYTES) -> list[Step]:
    """Steps for all modules that are not done, layer by layer: a step a module, but for small or entangled experts.

    `apart` are the bytes of a step of experts that read nothing in common.
    """
    tasks_of: dict[str, list[ModuleTask]] = {}
    for job_run in runs:
        for name, module in job_run.plan.modules.items():
            if not job_run.has_factor(name) and not job_run.is_done(name):
                tasks_of.setdefault(name, []).append(ModuleTask(job_run, module))
    steps = []
    for names in bundles({name: tasks_of[name] for name in sorted(tasks_of, key=order_of)}, apart):
        tasks = [task for name in names for task in tasks_of[name]]
        whole = all(task.elementwise for task in tasks)  # else all of them, so that each tensor is read once
        steps.append((_elementwise if whole else _together)(names[0], tasks))
    return steps


def module_step(name: str, wanted: Iterable[tuple[JobRun, str]]) -> Step:
    """One step for modules of jobs that share tensors; what is done is left out."""
    return _together(
        name, [ModuleTask(r, r.plan.modules[m]) for r, m in wanted if m in r.plan.modules and not r.is_done(m)]
    )


def _together(name: str, tasks: Sequence[ModuleTask]) -> Step:
    step = Step(name, {read.key: read for task in tasks for read in task.reads()}, [*tasks])
    step.scratch = STRIP_BYTES + max(map(_scratch, tasks), default=0) + sum(map(_projected, tasks)) + _held(tasks)
    return step


def _held(tasks: Sequence[ModuleTask]) -> int:
    """Host bytes of decoded regions, of stacked parts, and of output regions that several modules share."""
    decoded: dict[Hashable, int] = {}
    for task in tasks:
        for place in task.places():
            if isinstance(place, Weight) and not (task.in_codes and place.stored.in_codes):
                for part in place.stored.parts:
                    if part.codec is not None:
                        decoded[place.source.identity, part.block] = 4 * part.stored[0] * part.stored[1]
                if len(place.stored.parts) > 1:
                    decoded[place.key] = 4 * place.stored.numel
        for stored in task.plan.writes.values():
            for part in stored.parts if not stored.is_tensor else ():
                decoded[id(task.run), part.block] = 4 * part.stored[0] * part.stored[1]
    return sum(decoded.values())


def _elementwise(name: str, tasks: Sequence[ModuleTask | CopyTask]) -> Step:
    """A step whose tensors are read strip by strip."""
    reads = {read.key: read for task in tasks for read in task.reads()}
    nbytes = sum(read.ref.nbytes for read in reads.values())
    added = [task.added.ref.nbytes for task in tasks if task.added is not None]
    scratch = 4 * 4 * PIECE + min(nbytes, len(reads) * STRIP_BYTES)  # pieces in fp32, and strips
    scratch += min(max(added, default=0), STRIP_BYTES) + len(reads) * 4 * BLOCK
    return Step(name, {}, [*tasks], scratch=scratch, copied=nbytes + sum(added), strips=True)


def copy_steps(runs: Sequence[JobRun]) -> list[Step]:
    """Steps for the tensors that are taken over and not yet written."""
    steps = []
    for job_run in runs:
        dtypes = {name: ref.dtype for file in job_run.plan.files for name, ref in file.tensors.items()}
        for copy in job_run.plan.copies:
            if job_run.writer is None or copy.name not in job_run.writer.hashes:
                task = CopyTask(job_run, copy, cast=dtypes[copy.name] != copy.ref.dtype or copy.added is not None)
                whole = Step(copy.name, {}, [task], scratch=min(copy.ref.nbytes, COPY_BYTES), copied=copy.ref.nbytes)
                steps.append(_elementwise(copy.name, [task]) if task.cast else whole)
    return steps


def workers_for(device: torch.device) -> int:
    """Compute threads: one a core, each with single-threaded torch; or, for a CUDA device, each with its own stream."""
    if device.type == "cuda":
        return DEVICE_WORKERS
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pass_steps(runs: Sequence[JobRun], device: torch.device) -> list[Step]:
    """All steps of a pass, layer by layer, so that an output's files are finished one after the other."""
    copies = [(-1.0 if (layer := layer_of(step.name)) is None else layer, step) for step in copy_steps(runs)]
    modules = [(order_of(step.name)[0], step) for step in module_steps(runs, bytes_apart(device))]
    return [step for _, step in sorted([*copies, *modules], key=lambda placed: placed[0])]


def order_of(name: str) -> tuple[float, Any]:
    layer = layer_of(name)
    return (float("inf") if layer is None else layer, natural(name))


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
        rows, columns = weight.stored.shape
        # A weight stored in x out is put together from its tiles.
        whole = job.dense_scratch + 4 * weight.stored.transposed
        tiles = 4 * 4 * min(rows, ROWS) * columns
        return whole * weight.stored.numel + tiles + (_gate_scratch(weight) if job.gated else 0)
    if isinstance(finetuned, Weight):
        return _gate_scratch(finetuned)
    rank, rows, columns = _written_rank(task), finetuned.lora.b.shape[0], finetuned.lora.a.shape[1]
    grams = 8 * (6 * rank * rank + 2 * min(max(ELEMENTS, rank), rank * max(rows, columns)))  # of the effect, in fp64
    return 3 * 4 * (rows + columns) * rank + grams + job.takes_aligned * job.dense_scratch * rows * columns


def _gate_scratch(weight: Weight) -> int:
    """Of a full delta's gate: some columns of it and of its products, and V V^T where that is the smaller way."""
    rows, columns = weight.stored.shape
    return 4 * rows * (4 * min(columns, DENSE_COLUMNS) + (rows if rows < columns else 0))


def _written_rank(task: ModuleTask) -> int:
    finetuned, safe = task.plan.finetuned, task.plan.safe
    assert isinstance(finetuned, Pair)
    parts = task.run.plan.parts(finetuned.lora, safe.lora if isinstance(safe, Pair) else None)
    return max(parts.values(), default=finetuned.lora.rank)
