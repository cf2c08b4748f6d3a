"""The pass of the calibrated jobs: layer by layer over the aligned model, factors first, then every job's modules."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels.alignment.stacks import LANES
from safeshard.kernels.calibrated.stacks import STACK
from safeshard.streamer.calibration.groups import FactorSource, Group, Needs, device_bytes, resident_bytes
from safeshard.streamer.calibration.hidden_states import HiddenStates, clear_states
from safeshard.streamer.clock import Clock
from safeshard.streamer.device import tried_twice
from safeshard.streamer.inputs.read import Step
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import Pair
from safeshard.streamer.run.flow.compute import Given, compute_step
from safeshard.streamer.run.flow.steps import module_step, workers_for
from safeshard.streamer.run.flow.stream import Buffers
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.write.writer import Writer

Compute = Callable[[Step, Mapping[Hashable, Tensor]], None]
RunSteps = Callable[[Sequence[Step], Compute], None]


def run_calibrated(
    runs: Sequence[JobRun], run_steps: RunSteps, *, device: torch.device, buffers: Buffers, clock: Clock
) -> None:
    """Serve all jobs that share a factor source in one pass over its layers; nothing is run where all is done."""
    for source, sharing in _by_source(runs):
        if _all_steps(source, sharing):
            _serve(source, sharing, run_steps, device, buffers, clock)
        clear_states(writer.staging for writer in _writers(sharing))


def planned_steps(runs: Sequence[JobRun]) -> list[Step]:
    """The steps of the calibrated pass, as far as headers tell."""
    return [step for source, sharing in _by_source(runs) for step in _all_steps(source, sharing)]


def arithmetic_bytes(runs: Sequence[JobRun]) -> int:
    """What the calibrated pass holds at most where the arithmetic is done, one step at a time."""
    return max(
        [device_bytes(source, _all_steps(source, sharing), _needs(sharing)) for source, sharing in _by_source(runs)],
        default=0,
    )  # fmt: skip


def host_bytes(runs: Sequence[JobRun], device: torch.device) -> int:
    """What it holds of host memory at least. Hidden states come on top, in memory or in a file."""
    if device.type == "cpu":
        return arithmetic_bytes(runs)
    steps = [step for source, sharing in _by_source(runs) for step in _all_steps(source, sharing, on_device=True)]
    ahead = max([source.ahead_bytes for source, _ in _by_source(runs)], default=0)
    return ahead + max([step.cost for step in steps], default=0)


def batches_at_once(source: FactorSource, device: torch.device, memory: int, needs: Needs) -> int:
    """How many batches of a layer to run side by side, one a core, as far as host `memory` goes beside its Grams."""
    room = memory - resident_bytes(source, needs) - source.forward_bytes
    if device.type != "cpu" or not source.batch_bytes:
        return 1
    return max(1, min(workers_for(device), 1 + room // source.batch_bytes))


def _by_source(runs: Sequence[JobRun]) -> list[tuple[FactorSource, list[JobRun]]]:
    shared: dict[int, tuple[FactorSource, list[JobRun]]] = {}
    for job_run in runs:
        if (source := job_run.plan.factors) is not None:
            shared.setdefault(id(source), (source, []))[1].append(job_run)
    return list(shared.values())


def _needs(runs: Sequence[JobRun]) -> Needs:
    """What jobs that share a source take of it."""
    return Needs(any(r.job.takes_grams for r in runs), len(set(_dampings(runs))))


def _dampings(runs: Sequence[JobRun]) -> list[float | None]:
    """The dampings at which jobs ask for factors, in the order that serves each once."""
    return sorted({r.job.damping for r in runs if not r.job.takes_grams}, key=lambda d: d or 0.0)


def _served(job_run: JobRun) -> tuple[bool, float]:
    """Jobs in this order share what was made last."""
    job = job_run.job
    return job.takes_grams, (job_run.strength_or(0.0) if job.takes_grams else job.damping or 0.0)


def _all_steps(source: FactorSource, runs: Sequence[JobRun], on_device: bool = False) -> list[Step]:
    return [step for layer in source.planned() for group in layer for step in _steps(group, runs, on_device)]


def _steps(group: Group, runs: Sequence[JobRun], on_device: bool = False) -> list[Step]:
    """A step a linear, or one for the group where a step makes what its linears share.

    `on_device` leaves out what the arithmetic takes.
    """
    needs = _needs(runs)
    together = group.is_saved or needs.keeps_gram or group.tokens is not None  # gate and up may lie in one region
    runs = sorted(runs, key=_served)
    block = max(getattr(r.job, "block_size", 0) for r in runs)
    rows_of_u = 4 * group.width * min(block, group.width)  # those of a block's kept columns
    steps = []
    for modules in [group.modules] if together else [(name,) for name in group.modules]:
        step = module_step(modules[0], [(r, own) for r in runs for name in modules for own in r.plan.called(name)])
        step.reads |= {read.key: read for read in group.reads(needs, _dampings(runs))}
        if not on_device:
            step.scratch = max(step.scratch + rows_of_u, group.scratch(needs) + _stacked(step, group.width))
        if step.tasks:
            steps.append(step)
    return steps


def _stacked(step: Step, width: int) -> int:
    """What adapters that are solved together hold: the results of all, and a few matrices of a stack."""
    ranks = [
        task.plan.finetuned.lora.rank
        for task in step.tasks
        if task.run.job.takes_grams and isinstance(task.plan.finetuned, Pair)
    ]
    return 4 * width * (sum(ranks) + 5 * min(STACK, LANES * len(ranks) + sum(ranks)))


def _serve(
    source: FactorSource,
    runs: Sequence[JobRun],
    run_steps: RunSteps,
    device: torch.device,
    buffers: Buffers,
    clock: Clock,
) -> None:
    on_device = device.type != "cpu"
    needs = _needs(runs)
    hidden = min(source.hidden_bytes, buffers.limit // 2, buffers.limit - host_bytes(runs, device))
    groups: dict[str, Group] = {}

    def compute(step: Step, loaded: Mapping[Hashable, Tensor]) -> None:
        group = groups[step.name]

        def given(job: Job) -> Given:
            start = time.perf_counter()
            found = tried_twice(device, step.name, lambda: group.serve(job, needs, loaded, device))
            clock.add("factor", start)
            return found

        try:
            compute_step(step, loaded, device, clock, given, _noted(group))
        finally:
            group.forget()

    left = {r.plan.linear(name) for r in runs for name in r.plan.modules if r.has_factor(name) and not r.is_done(name)}
    kept = source.ahead_bytes if on_device else resident_bytes(source, needs) + source.kept_bytes
    with _held(buffers, hidden + kept):
        workers = batches_at_once(source, device, buffers.limit - hidden, needs)
        layers = source.layers(device, hidden, _hidden_states(source, runs), workers)
        forward = 0 if on_device else source.forward_bytes + (workers - 1) * source.batch_bytes - source.kept_bytes
        while left and (layer := _next(source, layers, buffers, forward, clock)) is not None:
            groups.update({name: group for group in layer for name in group.modules})
            run_steps([step for group in layer for step in _steps(group, runs, on_device)], compute)
            left -= groups.keys()
            groups.clear()  # the factors go before the next layer runs
            layer.clear()


def _noted(group: Group) -> dict[str, Any]:
    """What the manifest says of an expert's Gram."""
    if group.tokens is None:
        return {}
    return {"tokens": group.tokens, **({"shared_gram": group.shared} if group.shared else {})}


def _next(
    source: FactorSource, layers: Iterator[list[Group]], buffers: Buffers, nbytes: int, clock: Clock
) -> list[Group] | None:
    """The next layer; its time and the bytes read for it are counted as calibration."""
    start, before = time.perf_counter(), source.bytes_read
    with _held(buffers, nbytes):
        layer = next(layers, None)
    clock.add("calibrate", start, source.bytes_read - before)
    return layer


@contextlib.contextmanager
def _held(buffers: Buffers, nbytes: int) -> Iterator[None]:
    """Count bytes that are held outside of any step."""
    step = Step("calibration", scratch=nbytes)
    buffer = buffers.take(step)
    try:
        yield
    finally:
        buffers.give(step, buffer)


def _hidden_states(source: FactorSource, runs: Sequence[JobRun]) -> HiddenStates:
    """What the jobs share: their folders, the first layer that one of them needs, their journals."""
    left = [any(_steps(group, runs) for group in layer) for layer in source.planned()]
    writers = _writers(runs)

    def commit() -> None:
        for writer in writers:
            writer.commit()

    first = source.layer_numbers[left.index(True)]
    return HiddenStates([writer.staging for writer in writers], first, commit)


def _writers(runs: Sequence[JobRun]) -> list[Writer]:
    return [job_run.writer for job_run in runs if job_run.writer is not None]
