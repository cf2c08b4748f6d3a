"""The pass of the calibrated jobs: layer by layer over the aligned model, factors first, then every job's modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from safeshard.streamer.compute import compute_step
from safeshard.streamer.factors import Group
from safeshard.streamer.steps import JobRun, module_step
from safeshard.streamer.stream import Clock, Step

Compute = Callable[[Step, Mapping[Hashable, Tensor]], None]


def run_calibrated(
    runs: Sequence[JobRun],
    run_steps: Callable[[Sequence[Step], Compute], None],
    *,
    device: torch.device,
    memory: int,
    clock: Clock,
) -> None:
    """Serve all jobs that share a factor source in one pass over its layers.

    A layer's steps are its groups of linears with one input: a worker factors the group's Gram and serves every job.
    """
    shared: dict[int, list[JobRun]] = {}
    for job_run in runs:
        if any(not job_run.is_done(name) for name in job_run.plan.modules if job_run.has_factor(name)):
            shared.setdefault(id(job_run.plan.factors), []).append(job_run)
    for sharing in shared.values():
        _serve(sharing, run_steps, device, memory, clock)


def _serve(
    runs: Sequence[JobRun],
    run_steps: Callable[[Sequence[Step], Compute], None],
    device: torch.device,
    memory: int,
    clock: Clock,
) -> None:
    source, percdamp = runs[0].plan.factors, getattr(runs[0].job, "percdamp", 0.0)
    assert source is not None
    groups: dict[str, Group] = {}

    def compute(step: Step, loaded: Mapping[Hashable, Tensor]) -> None:
        start = time.perf_counter()
        factor = groups[step.name].factor(percdamp, loaded, device)
        clock.add("factor", start)
        compute_step(step, loaded, device, clock, factor)

    for layer in _timed(source.layers(device, memory, _spill_folder(runs)), clock):
        groups.update({group.modules[0]: group for group in layer})
        run_steps([step for group in layer if (step := _step(group, runs)).tasks], compute)
        groups.clear()  # the Grams go before the next layer runs


def _step(group: Group, runs: Sequence[JobRun]) -> Step:
    step = module_step(group.modules[0], [(r, name) for r in runs for name in group.modules])
    step.scratch += group.scratch
    if group.saved is not None:
        step.reads[group.saved.key] = group.saved
    return step


def _timed(layers: Iterator[Sequence[Group]], clock: Clock) -> Iterator[Sequence[Group]]:
    """The same layers, with the time to produce each counted as calibration."""
    while True:
        start = time.perf_counter()
        groups = next(layers, None)
        clock.add("calibrate", start)
        if groups is None:
            return
        yield groups


def _spill_folder(runs: Sequence[JobRun]) -> Path:
    writer = runs[0].writer
    assert writer is not None
    return writer.staging
