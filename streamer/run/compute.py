"""What one step computes: the gates that its jobs share, then each job's edit, written at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels.effect import Tally
from safeshard.kernels.factor import Factor
from safeshard.kernels.gate import Gate, dense_gate, lora_gate
from safeshard.manifests.errors import RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Effect, Fallback, ModuleEntry
from safeshard.streamer.clock import Clock
from safeshard.streamer.inputs.expert_lora import read_ref, view_of
from safeshard.streamer.inputs.layouts import Part
from safeshard.streamer.inputs.read import Read, Step
from safeshard.streamer.methods.base import Lora, Module
from safeshard.streamer.plan.job_plan import Pair, Weight
from safeshard.streamer.run.effects import effect, measured_pair, measured_tiles
from safeshard.streamer.run.steps import CopyTask, ModuleTask
from safeshard.streamer.run.strips import compute_strips
from safeshard.streamer.sources import Source
from safeshard.streamer.write.finite import NotFiniteError, refuse_not_finite

UNDEFINED = "cosine undefined: the fine-tuned delta or the alignment delta is zero"


class Inputs:
    """A step's tensors on the compute device, each moved once."""

    def __init__(self, loaded: Mapping[Hashable, Tensor], device: torch.device) -> None:
        self._loaded, self._device = loaded, device
        self._moved: dict[Hashable, Tensor] = {}
        self._decoded: dict[Hashable, Tensor] = {}

    def tensor(self, read: Read) -> Tensor:
        if read.key not in self._moved:
            self._moved[read.key] = self._loaded[read.key].to(self._device, non_blocking=True)
        return self._moved[read.key]

    def weight(self, place: Weight) -> Tensor:
        """A weight as O x I, whatever its storage."""
        seen = [part.view.of(self.matrix(place.source, part)) for part in place.stored.parts]
        return seen[0] if len(seen) == 1 else self._once(place.key, lambda: torch.cat(seen))

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


def compute_step(
    step: Step,
    loaded: Mapping[Hashable, Tensor],
    device: torch.device,
    clock: Clock,
    factor: Factor | str | None = None,
) -> None:
    """Run all tasks of a step. `factor` is that of the step's modules, or says why they have none.

    Where the device runs out of memory, the jobs are served again in two halves, which the manifest records.

    Raises:
        RunError: a tensor holds NaN or infinity, writing failed, or half of the jobs are too many for the device.
    """
    if step.strips:
        compute_strips(step, device, clock)
        return
    why = None
    try:
        _compute(step.tasks, loaded, device, clock, factor)
    except torch.cuda.OutOfMemoryError as error:
        why = _first_line(error)
    if why is not None:  # not while the error is handled: it would keep the memory of what failed
        _compute_halves(step, loaded, device, clock, factor, why)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the buffer that was copied from goes back to the readers


def _compute_halves(
    step: Step,
    loaded: Mapping[Hashable, Tensor],
    device: torch.device,
    clock: Clock,
    factor: Factor | str | None,
    why: str,
) -> None:
    middle = len(step.tasks) // 2
    for job_run in {id(task.run): task.run for task in step.tasks}.values():
        done = "the jobs in two halves" if middle else "another try"
        job_run.fall_back(Fallback(asked="all jobs of a module at once", done=done, why=why, subject=step.name))
    try:
        for half in filter(None, (step.tasks[:middle], step.tasks[middle:])):
            if device.type == "cuda":
                torch.cuda.empty_cache()
            _compute(half, loaded, device, clock, factor)
    except torch.cuda.OutOfMemoryError as error:
        remedy = "use a device with more memory, fewer jobs a batch, or --device cpu; the same command resumes"
        raise RunError(f"{step.name}: the device is out of memory: {_first_line(error)}", remedy) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _compute(
    tasks: Sequence[ModuleTask | CopyTask],
    loaded: Mapping[Hashable, Tensor],
    device: torch.device,
    clock: Clock,
    factor: Factor | str | None,
) -> None:
    inputs = Inputs(loaded, device)
    gates = _gates([t for t in tasks if isinstance(t, ModuleTask)], inputs)
    for task in tasks:
        if isinstance(task, CopyTask):
            _copy(task, inputs, clock)
        elif not task.run.is_done(task.plan.name):
            _decide(task, inputs, gates, clock, factor)


def _copy(task: CopyTask, inputs: Inputs, clock: Clock) -> None:
    start, writer = time.perf_counter(), task.run.writer
    assert writer is not None
    if task.cast:
        writer.write(task.copy.name, inputs.tensor(Read(task.copy.source, task.copy.ref)))
        clock.add("write", start)
    else:
        writer.copy(task.copy)
        clock.add("copy", start, task.copy.ref.nbytes)


def _gates(tasks: list[ModuleTask], inputs: Inputs) -> dict[Hashable, Gate]:
    """Each distinct gate once; adapters that share a pair of checkpoints share one pass over V."""
    gates: dict[Hashable, Gate] = {}
    groups: dict[Hashable, dict[Hashable, ModuleTask]] = {}
    for task in tasks:
        if task.run.needs_gate(task.plan.name):
            kind = type(task.plan.finetuned)
            same = groups.setdefault((task.gate_key[:2], kind), {})
            if task.gate_key not in same or task.run.job.keeps_dense_projection:
                same[task.gate_key] = task
    for group in groups.values():
        first = next(iter(group.values())).plan
        assert first.aligned is not None
        assert first.unaligned is not None
        aligned, unaligned = inputs.weight(first.aligned), inputs.weight(first.unaligned)
        deltas = {key: inputs.delta(task.plan.finetuned) for key, task in group.items()}
        pairs = {key: (delta.a, delta.b) for key, delta in deltas.items() if isinstance(delta, Lora)}
        if pairs:
            gates |= dict(zip(pairs, lora_gate(aligned, unaligned, list(pairs.values())), strict=True))
        for key, delta in deltas.items():
            if isinstance(delta, Tensor):
                project = group[key].run.job.keeps_dense_projection
                gates[key] = dense_gate(aligned, unaligned, delta, project=project)
    return gates


def _decide(
    task: ModuleTask, inputs: Inputs, gates: Mapping[Hashable, Gate], clock: Clock, factor: Factor | str | None
) -> None:
    job_run, plan = task.run, task.plan
    gate = gates.get(task.gate_key) if job_run.needs_gate(plan.name) else None
    cosine = job_run.cosines.get(plan.name)
    if gate is not None:
        value = gate.cosine.item()
        cosine = value if math.isfinite(value) else None
        if cosine is None:
            _refuse_not_finite(task, inputs)
        if plan.name not in job_run.cosines:
            job_run.score(plan.name, cosine)
    if job_run.is_done(plan.name):
        return
    if job_run.job.calibrated or (plan.writes.keys() == {"b"} and gate is None):
        _refuse_not_finite(task, inputs)  # what is not selected, or an A that is only copied, the writer never sees
    module = _module(task, inputs, gate, cosine, factor)
    edit = job_run.job.edit(module)
    start = time.perf_counter()
    try:
        written = _write(task, module, edit.tensors)
    except NotFiniteError:
        _refuse_not_finite(task, inputs)
        raise
    clock.add("write", start)
    fields: dict[str, Any] = {"cosine": cosine, "threshold": job_run.limit, **edit.fields, "effect": written}
    if job_run.job.gated and cosine is None:
        fields["note"] = UNDEFINED
    entry = ModuleEntry(name=plan.name, decision=edit.decision, **fields)
    job_run.decide(plan.name, entry.model_dump(mode="json", exclude_none=True))


def _module(
    task: ModuleTask, inputs: Inputs, gate: Gate | None, cosine: float | None, factor: Factor | str | None
) -> Module:
    job_run, plan = task.run, task.plan
    return Module(
        plan.name,
        finetuned=inputs.delta(plan.finetuned),
        aligned=inputs.weight(plan.aligned) if job_run.job.writes_checkpoint and plan.aligned else None,
        safe=inputs.delta(plan.safe) if plan.safe else None,
        projected=gate.projected if gate is not None else None,
        cosine=math.nan if job_run.job.gated and cosine is None else cosine,
        chosen=plan.name in job_run.chosen if job_run.chosen is not None else None,
        factor=factor if isinstance(factor, Factor) else None,
        note=factor if isinstance(factor, str) else "",
    )


def _write(task: ModuleTask, module: Module, tensors: Mapping[str, Tensor | Iterator[Tensor]]) -> Effect:
    """Write a module's new tensors, and measure what they leave of its delta."""
    writer, plan = task.run.writer, task.plan
    assert writer is not None
    if "weight" in plan.writes:
        return _write_weight(task, module, tensors["weight"])
    new = {part: tensor for part in plan.writes if isinstance(tensor := tensors[part], Tensor)}
    for part, tensor in new.items():
        writer.write(plan.writes[part].name, tensor)
    old, pair = module.finetuned, plan.finetuned
    assert isinstance(old, Lora)
    assert isinstance(pair, Pair)
    dtypes = {part: writer.place(ref.name).dtype for part, ref in (("a", pair.lora.a), ("b", pair.lora.b))}
    return measured_pair(old, new, 1.0 if task.run.job.rescales else old.scaling, dtypes)


def _write_weight(task: ModuleTask, module: Module, tensor: Tensor | Iterator[Tensor]) -> Effect:
    """Write a module's new weight. Where it is stored quantised, its effect is that of the numbers that are coded."""
    writer, stored = task.run.writer, task.plan.writes["weight"]
    assert writer is not None
    assert module.aligned is not None
    dtype = writer.place(next(iter(stored.names))).dtype if all(p.codec is None for p in stored.parts) else "F32"
    every = 4 if task.run.job.gated or isinstance(module.finetuned, Tensor) else 64  # little beside what it takes
    tally = Tally(module.aligned.numel(), every, module.aligned.device)
    if isinstance(tensor, Tensor):
        for _ in measured_tiles(module, [tensor], dtype, tally):
            pass
    else:
        tensor = measured_tiles(module, tensor, dtype, tally)
    if not stored.is_tensor:
        task.run.assembler.write(task.plan.name, "weight", stored, tensor)
    else:
        if stored.transposed:
            tensor = (tensor if isinstance(tensor, Tensor) else torch.cat(list(tensor))).T
        writer.write(stored.name, tensor)
    return effect(tally.products())


def _refuse_not_finite(task: ModuleTask, inputs: Inputs) -> None:
    refuse_not_finite((read, inputs.tensor(read)) for read in task.reads())
