"""What one step computes: the gates that its jobs share, then each job's edit, written at once.

A device is waited for once where the gates decide, and once for every few megabytes of results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels.calibrated.factor import Factor
from safeshard.kernels.calibrated.grams import Grams
from safeshard.kernels.gate import Gate, dense_gate, lora_gate
from safeshard.kernels.merge import Sum
from safeshard.manifests.errors import RunError
from safeshard.manifests.schema import Fallback, ModuleEntry
from safeshard.streamer.clock import Clock
from safeshard.streamer.device import Arrivals, memory_errors, relieved
from safeshard.streamer.inputs.codecs.base import Encoded
from safeshard.streamer.inputs.read import Read, Step
from safeshard.streamer.methods.base import Edit, Job, Lora, Module
from safeshard.streamer.methods.shared.served import merged, served
from safeshard.streamer.plan.job_plan import ModulePlan
from safeshard.streamer.run.flow.effects import effect
from safeshard.streamer.run.flow.on_device import Inputs
from safeshard.streamer.run.flow.strips import compute_strips
from safeshard.streamer.run.flow.tasks import CopyTask, ModuleTask
from safeshard.streamer.run.flow.together import Together
from safeshard.streamer.run.flow.writing import encoding_fields, write_module

Given = Factor | Grams | str  # what a job gets of a module's calibration, or why there is no factor
UNDEFINED = "cosine undefined: the fine-tuned delta or the alignment delta is zero"


def compute_step(
    step: Step,
    loaded: Mapping[Hashable, Tensor],
    device: torch.device,
    clock: Clock,
    given: Callable[[Job], Given] | None = None,
    noted: Mapping[str, Any] | None = None,
) -> None:
    """Run all tasks of a step. `given` is what a job gets of its modules' calibration, or why there is nothing; `noted`
    is what their manifest entries say of it.

    Where the device runs out of memory, the jobs are served again in two halves, which the manifest records.

    Raises:
        RunError: a tensor holds NaN or infinity, writing failed, or half of the jobs are too many for the device.
    """
    if step.strips:
        compute_strips(step, clock)
        return
    relieved(
        device,
        lambda: _compute(step.tasks, loaded, device, clock, given, noted or {}),
        lambda why: _compute_halves(step, loaded, device, clock, given, noted or {}, why),
    )


def _compute_halves(
    step: Step,
    loaded: Mapping[Hashable, Tensor],
    device: torch.device,
    clock: Clock,
    given: Callable[[Job], Given] | None,
    noted: Mapping[str, Any],
    why: str,
) -> None:
    middle = len(step.tasks) // 2
    for job_run in {id(task.run): task.run for task in step.tasks}.values():
        done = "the jobs in two halves" if middle else "another try"
        job_run.fall_back(Fallback(asked="all jobs of a module at once", done=done, why=why, subject=step.name))
    remedy = "use a device with more memory, fewer jobs a batch, or --device cpu; the same command resumes"
    with memory_errors(step.name, remedy):
        for half in filter(None, (step.tasks[:middle], step.tasks[middle:])):
            _compute(half, loaded, device, clock, given, noted)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _compute(
    tasks: Sequence[ModuleTask | CopyTask],
    loaded: Mapping[Hashable, Tensor],
    device: torch.device,
    clock: Clock,
    given: Callable[[Job], Given] | None,
    noted: Mapping[str, Any],
) -> None:
    inputs, arrivals = Inputs(loaded, device), Arrivals(device)
    together = Together(arrivals, device)
    curves: dict[Hashable, list[float]] = {}
    with arrivals.landing():
        gates = _gates([t for t in tasks if isinstance(t, ModuleTask)], inputs)
        cosines = torch.stack([gate.cosine for gate in gates.values()]).tolist() if gates else ()
        decided = {key: (gate, cosine) for (key, gate), cosine in zip(gates.items(), cosines, strict=True)}
        with _foreseen(tasks, inputs, given) as modules:
            for task in tasks:
                if isinstance(task, CopyTask):
                    _copy(task, inputs, clock)
                elif not task.run.is_done(task.plan.name):
                    _decide(task, inputs, decided, clock, given, noted, arrivals, together, curves, modules)
        together.finish()


@contextmanager
def _foreseen(
    tasks: Sequence[ModuleTask | CopyTask], inputs: Inputs, given: Callable[[Job], Given] | None
) -> Iterator[dict[int, Module]]:
    """Modules of jobs that take Grams, by the ids of their tasks; inside, the Grams know what they will be asked."""
    modules: dict[int, Module] = {}
    measured = set()
    for task in tasks:
        if not isinstance(task, ModuleTask) or not task.job.takes_grams or task.run.is_done(task.plan.name):
            continue
        module = _module(task, inputs, None, None, given(task.run.job) if given is not None else "")
        modules[id(task)] = module
        if module.grams is None or (task.run.measures and (key := _curve(task)) in measured):
            continue
        if task.run.measures:
            measured.add(key)
        task.job.foresee(module, measures=task.run.measures)
    try:
        yield modules
    finally:
        for module in modules.values():
            if module.grams is not None:
                module.grams.forget()


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
        load = inputs.operand if all(task.in_codes for task in group.values()) else inputs.weight
        aligned, unaligned = load(first.aligned), load(first.unaligned)
        deltas = {key: inputs.delta(task.plan.finetuned) for key, task in group.items()}
        pairs = {key: (delta.a, delta.b) for key, delta in deltas.items() if isinstance(delta, Lora)}
        if pairs:
            gates |= dict(zip(pairs, lora_gate(aligned, unaligned, list(pairs.values())), strict=True))
        for key, delta in deltas.items():
            if isinstance(delta, Tensor):
                project = group[key].run.job.keeps_dense_projection
                assert isinstance(aligned, Tensor)
                assert isinstance(unaligned, Tensor)
                gates[key] = dense_gate(aligned, unaligned, delta, project=project)
    return gates


def _decide(
    task: ModuleTask,
    inputs: Inputs,
    gates: Mapping[Hashable, tuple[Gate, float]],
    clock: Clock,
    given: Callable[[Job], Given] | None,
    noted: Mapping[str, Any],
    arrivals: Arrivals,
    together: Together,
    curves: dict[Hashable, list[float]],
    modules: Mapping[int, Module],
) -> None:
    job_run, plan = task.run, task.plan
    gate, value = gates.get(task.gate_key, (None, math.nan)) if job_run.needs_gate(plan.name) else (None, math.nan)
    cosine = job_run.cosines.get(plan.name)
    if gate is not None:
        cosine = value if math.isfinite(value) else None
        if cosine is None:
            inputs.refuse_not_finite(task.reads())
        if plan.name not in job_run.cosines:
            job_run.score(plan.name, cosine)
    if job_run.is_done(plan.name):
        return
    if job_run.job.calibrated or (plan.writes.keys() == {"b"} and gate is None):
        inputs.refuse_not_finite(task.reads())  # what is not selected, or an A that is only copied, is not written
    module = modules.get(id(task))
    if module is None:
        module = _module(task, inputs, gate, cosine, given(job_run.job) if given is not None else "")
    if job_run.measures and job_run.has_factor(plan.name):  # else --rest decides now: lm_head waits for no strength
        curve = [] if module.note else _measured(task, module, curves)
        _refuse_overflow(plan, curve)
        job_run.measured(plan.name, curve)
        return
    edit = task.job.edit(module)
    if "weight" in plan.writes and "weight" not in edit.tensors:
        edit = merged(edit, module, task.job)
    if (rank := job_run.plan.serve_rank) is not None and isinstance(module.finetuned, Lora):
        edit = served(edit, module.finetuned, task.job, rank)
    fields: dict[str, Any] = {"cosine": cosine, "threshold": job_run.limit, **edit.fields, **noted}

    def write(edit: Edit) -> None:
        encoded: list[Encoded] = []
        formed = {name: tensor for name, tensor in edit.tensors.items() if not isinstance(tensor, Sum)}
        left = write_module(task, module, formed, inputs, clock, arrivals, encoded)
        fields.update(encoding_fields(encoded))
        if job_run.job.gated and cosine is None:
            fields["note"] = UNDEFINED
        together.measure(left, decide)

    def decide(products: Sequence[float]) -> None:
        _refuse_overflow(plan, [value for value in fields.values() if isinstance(value, float)])
        entry = ModuleEntry(name=plan.name, decision=edit.decision, effect=effect(*products), **fields)
        job_run.decide(plan.name, entry.model_dump(mode="json", exclude_none=True))

    together.write(edit, write)


def _refuse_overflow(plan: ModulePlan, values: Sequence[float]) -> None:
    """Refuse a module whose numbers, finite as they are, have squares that fp32 cannot hold: nothing is known of it.

    Raises:
        RunError: some of `values`, which were measured or decided, is none.
    """
    if not all(map(math.isfinite, values)):
        problem = f"{plan.finetuned.source.spec}: {plan.name}: the delta is too large for fp32: what it does overflows"
        raise RunError(problem, "mend the fine-tuned model, then run again")


def _measured(task: ModuleTask, module: Module, curves: dict[Hashable, list[float]]) -> list[float]:
    """What a module lets through at each strength, once for all jobs that ask the same of the same delta."""
    key = _curve(task)
    if key not in curves:
        curves[key] = task.job.measure(module)
    return curves[key]


def _curve(task: ModuleTask) -> Hashable:
    """Equal for tasks that measure the same."""
    return id(task.run.plan.factors), task.plan.finetuned.key, task.plan.name, task.job.measured_like()


def _module(task: ModuleTask, inputs: Inputs, gate: Gate | None, cosine: float | None, given: Given) -> Module:
    job_run, plan = task.run, task.plan
    return Module(
        plan.name,
        finetuned=inputs.delta(plan.finetuned),
        aligned=inputs.weight(plan.aligned) if job_run.job.reads_aligned and plan.aligned else None,
        unaligned=inputs.weight(plan.unaligned) if plan.unaligned and not job_run.job.gated else None,
        safe=inputs.delta(plan.safe) if plan.safe else None,
        projected=gate.projected if gate is not None else None,
        cosine=math.nan if job_run.job.gated and cosine is None else cosine,
        chosen=plan.name in job_run.chosen if job_run.chosen is not None else None,
        factor=given if isinstance(given, Factor) else None,
        grams=given if isinstance(given, Grams) else None,
        strength=job_run.strength,
        note=given if isinstance(given, str) else "",
    )
