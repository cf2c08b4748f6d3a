"""Cutting a batch into parts: steps of work that write one tensor stay together, output shards as far as it goes.

The cut follows from the plans of all jobs and the number of parts alone, so that every worker makes the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from safeshard.streamer.inputs.read import Step
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.parts import Part
from safeshard.streamer.plan.written.files import output_file
from safeshard.streamer.run.calibrated import planned_steps
from safeshard.streamer.run.flow.steps import copy_steps, module_steps, order_of
from safeshard.streamer.run.flow.tasks import CopyTask, JobRun, ModuleTask


@dataclass
class _Bundle:
    """Steps that cannot be parted, as what they do of each job."""

    nbytes: int = 0
    shard: int = -1  # of the checkpoints that are written, where there are any
    names: list[str] = field(default_factory=list)
    modules: list[tuple[int, str]] = field(default_factory=list)  # number of the job, module
    copies: list[tuple[int, str]] = field(default_factory=list)


def cut(plans: Sequence[JobPlan], parts: Sequence[Part]) -> list[list[JobPlan]]:
    """What each of some parts of one cut does of each plan."""
    shares = _shares(plans, parts[0].count)
    return [_restricted(plans, part, shares[part.number - 1]) for part in parts]


def _restricted(plans: Sequence[JobPlan], part: Part, share: _Bundle) -> list[JobPlan]:
    modules, copies = ([set[str]() for _ in plans] for _ in range(2))
    for number, name in share.modules:
        modules[number].add(name)
    for number, name in share.copies:
        copies[number].add(name)
    return [_kept(plan, part, *own) for plan, *own in zip(plans, modules, copies, strict=True)]


def _shares(plans: Sequence[JobPlan], count: int) -> list[_Bundle]:
    """Work in the order of shards and layers, cut where the bytes are even; between shards if there are as many."""
    bundles = sorted(_bundles(plans), key=lambda b: (b.shard, min(map(order_of, b.names))))
    shards = [bundle.shard for bundle in bundles]
    blocks = {shard: [b for b in bundles if b.shard == shard] for shard in dict.fromkeys(shards)}
    grouped = list(blocks.values()) if len(blocks) >= count else [[bundle] for bundle in bundles]
    total = sum(bundle.nbytes for bundle in bundles)
    found, before = [_Bundle() for _ in range(count)], 0
    for group in grouped:
        size = sum(bundle.nbytes for bundle in group)
        middle = before + size / 2
        share = found[min(int(middle * count / total), count - 1) if total else 0]
        for bundle in group:
            share.modules += bundle.modules
            share.copies += bundle.copies
        before += size
    return found


def _bundles(plans: Sequence[JobPlan]) -> list[_Bundle]:
    """The steps of a pass over everything, those together that write to one tensor."""
    runs = [JobRun(plan) for plan in plans]
    numbers = {id(job_run): number for number, job_run in enumerate(runs)}
    shards = [_shard_of(plan) for plan in plans]
    steps = [*module_steps(runs), *planned_steps(runs), *copy_steps(runs)]
    roots = _together([[(numbers[id(t.run)], name) for t in step.tasks for name in _outputs(t)] for step in steps])
    found: dict[int, _Bundle] = {}
    for step, root in zip(steps, roots, strict=True):
        bundle = found.setdefault(root, _Bundle())
        bundle.nbytes += step.nbytes + step.copied
        _add(bundle, step, numbers, shards)
    return list(found.values())


def _add(bundle: _Bundle, step: Step, numbers: dict[int, int], shards: Sequence[dict[str, int]]) -> None:
    bundle.names.append(step.name)
    for task in step.tasks:
        number = numbers[id(task.run)]
        if isinstance(task, CopyTask):
            bundle.copies.append((number, task.copy.name))
        else:
            bundle.modules.append((number, task.plan.name))
        places = [shards[number][name] for name in _outputs(task) if name in shards[number]]
        bundle.shard = min([*places, *([bundle.shard] if bundle.shard >= 0 else [])], default=-1)


def _outputs(task: ModuleTask | CopyTask) -> set[str]:
    return {task.copy.name} if isinstance(task, CopyTask) else task.plan.tensors(task.run.job)


def _shard_of(plan: JobPlan) -> dict[str, int]:
    """The number of the shard that each tensor of a checkpoint goes to; an adapter is one file, which may be parted."""
    if not plan.job.writes_checkpoint:
        return {}
    return {name: number for number, file in enumerate(plan.files) for name in file.tensors}


def _together(groups: Sequence[Sequence[tuple[int, str]]]) -> list[int]:
    """For each group of names the number of the first group that it is tied to, by names in common."""
    parents = list(range(len(groups)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    first: dict[tuple[int, str], int] = {}
    for number, names in enumerate(groups):
        for name in names:
            one, other = sorted((root(number), root(first.setdefault(name, number))))
            parents[other] = one
    return [root(number) for number in range(len(groups))]


def _kept(plan: JobPlan, part: Part, modules: Collection[str], copies: Collection[str]) -> JobPlan:
    """What a part does of a plan: these modules and copies, in files that hold just their tensors."""
    kept = {name: module for name, module in plan.modules.items() if name in modules}
    taken = [copy for copy in plan.copies if copy.name in copies]
    names = {name for module in kept.values() for name in module.outputs} | {copy.name for copy in taken}
    tables = {f.name: [(n, r.dtype, r.shape) for n, r in f.tensors.items() if n in names] for f in plan.files}
    files = [output_file(name, tensors) for name, tensors in tables.items() if tensors]
    measured = [name for name in plan.modules if plan.job.target_leak is None or JobRun(plan).has_factor(name)]
    return replace(plan, modules=kept, copies=taken, files=files, side_files=[], part=part, shared=len(measured))
