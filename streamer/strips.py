"""Element-wise work on tensors of any size: strip by strip, so that no embedding needs memory of its own size."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from safeshard.manifests.schema import ModuleEntry
from safeshard.streamer.finite import NotFiniteError, refuse_not_finite
from safeshard.streamer.methods.base import Module
from safeshard.streamer.plan import Weight
from safeshard.streamer.steps import STRIP_BYTES, CopyTask, ModuleTask
from safeshard.streamer.stream import TORCH_DTYPES, Clock, Read, Step
from safeshard.streamer.writer import TensorWrite


def compute_strips(step: Step, device: torch.device, clock: Clock) -> None:
    """Run the element-wise tasks of one large tensor; each strip is read once for all of them.

    Raises:
        RunError: a tensor holds NaN or infinity, or reading or writing failed.
    """
    reads = {read.key: read for task in step.tasks for read in task.reads()}
    numel = next(iter(reads.values())).ref.numel
    writes = {id(task): _begin(task) for task in step.tasks}
    entries: dict[int, dict[str, Any]] = {}
    length = STRIP_BYTES // max(read.ref.item_bytes for read in reads.values())
    for start in range(0, numel, length):
        strip = {key: _read(read, start, min(length, numel - start), clock) for key, read in reads.items()}
        loaded = {key: tensor.to(device) for key, tensor in strip.items()}
        for task in step.tasks:
            try:
                entries[id(task)] = _edit(task, loaded, writes[id(task)], clock)
            except NotFiniteError:
                refuse_not_finite((read, strip[read.key]) for read in task.reads())
                raise
    for task in step.tasks:
        writes[id(task)].finish()
        if isinstance(task, ModuleTask):
            task.run.decide(task.plan.name, entries[id(task)])


def _begin(task: ModuleTask | CopyTask) -> TensorWrite:
    assert task.run.writer is not None
    (name,) = [task.copy.name] if isinstance(task, CopyTask) else task.plan.writes.values()
    return task.run.writer.begin(name)


def _read(read: Read, start: int, count: int, clock: Clock) -> Tensor:
    """`count` elements of a tensor from the `start`-th on, flat."""
    began, ref = time.perf_counter(), read.ref
    strip = torch.empty(count, dtype=TORCH_DTYPES[ref.dtype])
    view = strip.view(torch.uint8).numpy().data
    read.source.readinto(ref.file, ref.offset + start * ref.item_bytes, view)
    clock.add("read", began, len(view))
    return strip


def _edit(
    task: ModuleTask | CopyTask, strip: Mapping[Hashable, Tensor], write: TensorWrite, clock: Clock
) -> dict[str, Any]:
    """Treat one strip of one task and write what becomes of it; a module's entry is the same for every strip."""
    began = time.perf_counter()
    if isinstance(task, CopyTask):
        write.add(strip[Read(task.copy.source, task.copy.ref).key])
        clock.add("write", began)
        return {}
    aligned, tuned = task.plan.aligned, task.plan.finetuned
    assert isinstance(aligned, Weight)
    assert isinstance(tuned, Weight)
    base, theirs = (strip[Read(place.source, place.ref).key] for place in (aligned, tuned))
    edit = task.run.job.edit(Module(task.plan.name, finetuned=theirs, aligned=base))
    for piece in edit.tensors["weight"]:
        write.add(piece)
    clock.add("write", began)
    entry = ModuleEntry(name=task.plan.name, decision=edit.decision, **edit.fields)
    return entry.model_dump(mode="json", exclude_none=True)
