"""Element-wise work on tensors of any size, strip by strip: from the page cache through the core's cache and back.

So no embedding needs memory of its own size, and what is read once is not written to memory in between.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from safeshard.kernels.dense import PIECE
from safeshard.kernels.merge import Sum
from safeshard.kernels.tally import Tally
from safeshard.manifests.schema import ModuleEntry
from safeshard.streamer.clock import Clock
from safeshard.streamer.inputs.read import TORCH_DTYPES, Read, Step
from safeshard.streamer.methods.base import Edit, Module
from safeshard.streamer.plan.job_plan import Weight
from safeshard.streamer.run.flow.effects import effect, measured_tiles
from safeshard.streamer.run.flow.steps import STRIP_BYTES
from safeshard.streamer.run.flow.tasks import CopyTask, ModuleTask
from safeshard.streamer.sources.direct import pieces
from safeshard.streamer.write.finite import NotFiniteError, refuse_not_finite
from safeshard.streamer.write.tensor_write import TensorWrite

NEAR_BYTES = 1 << 22  # of a strip of each tensor
MEASURED = 512  # of so many pieces one, for what is left: strips pass fast, and one factor leaves the same of each
AHEAD_BYTES = 8 << 20  # which the system is asked to read ahead of the strips


def compute_strips(step: Step, clock: Clock) -> None:
    """Run the element-wise tasks of one name on the CPU; each strip is read once for all of them.

    A device would wait for each strip, and to bring it there and back takes longer than a core does for all of it.

    Raises:
        RunError: a tensor holds NaN or infinity, or reading or writing failed.
    """
    alike: dict[int, list[ModuleTask | CopyTask]] = {}  # models of one batch may differ in size
    for task in step.tasks:
        alike.setdefault(next(task.reads()).ref.numel, []).append(task)
    for numel, tasks in alike.items():
        _compute(tasks, numel, clock)


def _compute(tasks: Sequence[ModuleTask | CopyTask], numel: int, clock: Clock) -> None:
    """Run tasks whose tensors all have `numel` elements."""
    reads = {read.key: read for task in tasks for read in task.reads()}
    length = _length(reads.values())
    buffers = {
        key: torch.empty(min(length, numel), dtype=TORCH_DTYPES[read.ref.dtype])
        for key, read in reads.items()
        if not read.passes_by
    }
    writes = {id(task): _begin(task) for task in tasks}
    edits: dict[int, Edit] = {}
    tallies = {id(task): Tally(numel, MEASURED, torch.device("cpu")) for task in tasks}
    passing = {key: _pass_by(read, length) for key, read in reads.items() if read.passes_by}
    for start in range(0, max(numel, 1), length):  # one strip of nothing where there is nothing
        strip = {
            key: _next(read, passing[key], clock)
            if key in passing
            else _read(read, start, buffers[key][: numel - start], clock)
            for key, read in reads.items()
        }
        began = time.perf_counter()
        for task in tasks:
            try:
                _edit(task, strip, writes[id(task)], edits, tallies[id(task)], clock)
            except NotFiniteError:
                refuse_not_finite((read, strip[read.key]) for read in task.reads())
                raise
        clock.add("compute", began)
    for task in tasks:
        _add_rows(task, writes[id(task)], clock)
        writes[id(task)].finish()
        if isinstance(task, ModuleTask):
            edit = edits[id(task)]  # what is decided is the same for every strip
            left = effect(*(value.item() for value in tallies[id(task)].products()))
            entry = ModuleEntry(name=task.plan.name, decision=edit.decision, **edit.fields, effect=left)
            task.run.decide(task.plan.name, entry.model_dump(mode="json", exclude_none=True))


def _length(reads: Collection[Read]) -> int:
    """Elements a strip: few enough to stay in a core's cache, but many of what is read from afar."""
    near = all(read.source.local_path(read.ref.file) is not None for read in reads)
    return (NEAR_BYTES if near else STRIP_BYTES) // max(read.ref.item_bytes for read in reads)


def _begin(task: ModuleTask | CopyTask) -> TensorWrite:
    assert task.run.writer is not None
    (name,) = [task.copy.name] if isinstance(task, CopyTask) else task.plan.outputs
    return task.run.writer.begin(name)


def _read(read: Read, start: int, strip: Tensor, clock: Clock) -> Tensor:
    """Fill `strip` with the elements of a tensor from the `start`-th on."""
    began, ref, offset = time.perf_counter(), read.ref, start * read.ref.item_bytes
    view = strip.view(torch.uint8).numpy().data
    if offset % AHEAD_BYTES < len(view):
        read.source.prefetch(ref.file, ref.offset + offset, min(2 * AHEAD_BYTES, ref.nbytes - offset))
    read.source.readinto(ref.file, ref.offset + offset, view)
    clock.add("read", began, len(view))
    return strip


def _pass_by(read: Read, length: int) -> Iterator[memoryview]:
    """The strips of a tensor, `length` elements each, read past the page cache."""
    ref = read.ref
    return pieces(read.source, ref.file, ref.offset, ref.nbytes, length * ref.item_bytes)


def _next(read: Read, strips: Iterator[memoryview], clock: Clock) -> Tensor:
    began = time.perf_counter()
    view = next(strips)
    clock.add("read", began, len(view))
    dtype = TORCH_DTYPES[read.ref.dtype]
    return torch.frombuffer(view, dtype=dtype) if len(view) else torch.empty(0, dtype=dtype)


def _add_rows(task: ModuleTask | CopyTask, write: TensorWrite, clock: Clock) -> None:
    """Write the rows that the fine-tuned model alone has."""
    added = task.added
    if added is None:
        return
    length = STRIP_BYTES // added.ref.item_bytes
    buffer = torch.empty(min(length, added.ref.numel), dtype=TORCH_DTYPES[added.ref.dtype])
    for start in range(0, added.ref.numel, length):
        strip = _read(added, start, buffer[: added.ref.numel - start], clock)
        try:
            for piece in torch.split(strip, PIECE):
                write.add(piece)
        except NotFiniteError:
            refuse_not_finite([(added, strip)])
            raise


def _edit(
    task: ModuleTask | CopyTask,
    strip: Mapping[Hashable, Tensor],
    write: TensorWrite,
    edits: dict[int, Edit],
    tally: Tally,
    clock: Clock,
) -> None:
    """Treat one strip of one task and write what becomes of it; keep a module's edit for its entry."""
    began = time.perf_counter()
    if isinstance(task, CopyTask):
        pieces: Iterable[Tensor] = torch.split(strip[Read(task.copy.source, task.copy.ref).key], PIECE)
    else:
        aligned, tuned = task.plan.aligned, task.plan.finetuned
        assert isinstance(aligned, Weight)
        assert isinstance(tuned, Weight)
        base, theirs = (strip[next(place.reads()).key] for place in (aligned, tuned))
        module = Module(task.plan.name, finetuned=theirs, aligned=base)
        edit = edits[id(task)] = task.run.job.edit(module)
        weight = edit.tensors["weight"]
        assert not isinstance(weight, Sum)  # of pairs alone
        pieces = measured_tiles(module, weight, write.dtype, tally)
    for piece in pieces:
        write.add(piece)
    clock.add("write", began)
