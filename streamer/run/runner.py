"""The runner: one pass over the checkpoints serves every module of every job."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch

from safeshard.manifests.errors import Offence, RequestError, RunError, SafeshardError
from safeshard.manifests.schema import Caution, Fallback, ModuleEntry
from safeshard.manifests.sizes import human
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import RunOptions
from safeshard.streamer.plan.identity import fingerprint
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.parts import Part
from safeshard.streamer.plan.planner import Planner
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.calibrated import host_bytes
from safeshard.streamer.run.cut import cut
from safeshard.streamer.run.downloads import download, download_offences, shard_cache
from safeshard.streamer.run.ending.cautions import cautions
from safeshard.streamer.run.ending.finish import Measured, publish
from safeshard.streamer.run.ending.settled import public_offences, settle_finished
from safeshard.streamer.run.flow.bundles import bytes_apart
from safeshard.streamer.run.flow.steps import copy_steps, module_steps
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.run.one_pass import Pass, device_name
from safeshard.streamer.run.part_work import (
    discard_other_cuts,
    end_part,
    finished_part,
    know_from_parts,
    part_offences,
    part_writer,
    settle_part,
)  # fmt: skip
from safeshard.streamer.run.result import Result, earlier
from safeshard.streamer.write.destinations import destination
from safeshard.streamer.write.journal import HeldError
from safeshard.streamer.write.writer import Writer

log = logging.getLogger(__name__)


def plan_jobs(
    jobs: Sequence[Job],
    options: RunOptions,
    skip_finished: bool = False,
    part: Part | None = None,
    planner: Planner | None = None,
) -> list[JobPlan]:
    """Check all jobs by their inputs' headers, against each other and against the memory budget.

    Of a part the plans hold what it does of each job. A `planner` knows what it has opened and looked at before.

    Raises:
        RequestError: some job cannot run; every offence of every job.
    """
    planner = planner or Planner(shard_cache(options))
    plans = planner.plan(jobs, options.overwrite, skip_finished)
    if part is not None:
        if offences := list(part_offences(plans, part.count, options.overwrite)):
            raise RequestError(offences)
        (plans,) = cut(plans, [part])
    runs = [JobRun(plan) for plan in plans if not plan.finished]
    if offences := [*download_offences(download(runs), options), *public_offences(plans)]:
        raise RequestError(offences)
    need, name = largest_step([JobRun(plan) for plan in plans], torch.device(options.resolved_device()))
    if need > options.memory:
        remedy = "raise --memory, or split the batch"
        expected = f"at least {need} bytes ({human(need)})"
        raise RequestError(Offence("--memory", name, expected, human(options.memory), remedy))
    return plans


def largest_step(runs: Sequence[JobRun], device: torch.device) -> tuple[int, str]:
    """The host bytes that the largest step of a pass takes, and the step's name."""
    steps = (*module_steps(runs, bytes_apart(device)), *copy_steps(runs))
    costs = [(step.cost, step.name) for step in steps]
    return max([*costs, (host_bytes(runs, device), "a layer of the calibrated pass")])


def run(
    jobs: Sequence[Job],
    options: RunOptions,
    skip_finished: bool = False,
    part: Part | None = None,
    show: Callable[[int, bool], Progress] = Progress,
    planner: Planner | None = None,
) -> list[Result]:
    """Plan and run jobs in one pass; an interrupted run resumes where its journal ends.

    With `skip_finished`, jobs whose outputs are there already, from this very request, are passed by. Of a `part`, what
    it does of the jobs is done, and kept for `gather`. `show` makes what shows the progress. A `planner` has opened
    inputs and looked at places just before.

    Raises:
        RequestError: some job cannot run; nothing was written.
        RunError: it failed underway; the same call resumes.
    """
    device = torch.device(options.resolved_device())
    plans = plan_jobs(jobs, options, skip_finished, part, planner)
    if options.strict:
        refuse_cautions(plans)
    if options.dry_run:
        return [Result(plan.job, plan, None, {}) for plan in plans]
    for plan in plans:
        if plan.finished:
            settle_finished(plan)
    runs: list[JobRun] = []
    try:
        if part is not None:
            return _run_part(plans, options, runs, Pass(options, device, know_from_parts, show))
        _start([plan for plan in plans if not plan.finished], options, runs)
        pass_ = Pass(options, device, show=show)
        pass_.execute(runs)
        _refuse_changed(runs)
        doubtful = {id(r): found for r in runs if options.strict and (found := _decided_cautions(r))}
        results = {id(r.plan): _finish(r, pass_.measured(), options) for r in runs if id(r) not in doubtful}
        if doubtful:
            texts = [f"{r.job.output}: {each.text}" for r in runs for each in doubtful.get(id(r), ())]
            raise RunError("; ".join(texts), "the same command without --strict finishes what is refused here")
        return [results.get(id(plan)) or earlier(plan) for plan in plans]
    finally:
        for job_run in runs:
            if job_run.writer:
                with contextlib.suppress(RunError):  # the run's own error says more
                    job_run.writer.abandon()


def _run_part(plans: Sequence[JobPlan], options: RunOptions, runs: list[JobRun], pass_: Pass) -> list[Result]:
    """Do what a part does of jobs, but for what is finished."""
    device = device_name(pass_.device)
    records = {id(plan): finished_part(plan, device) for plan in plans if not plan.finished}
    left = [plan for plan in plans if not plan.finished and records[id(plan)] is None]
    for plan in plans:
        if not plan.finished and records[id(plan)] is not None:
            settle_part(plan)
    for plan in left if options.overwrite else ():
        discard_other_cuts(plan)
    _start(left, options, runs)
    pass_.execute(runs)
    _refuse_changed(runs)
    records |= {id(r.plan): end_part(r, pass_.measured()) for r in runs if not r.waits}
    return [earlier(p) if p.finished else Result(p.job, p, None, {}, record=records[id(p)]) for p in plans]


class SomeFailedError(RunError):
    """Of the jobs of a batch that was to keep going, some could not run or failed; `results` are the others'."""

    def __init__(self, results: list[Result], failures: list[tuple[Job, SafeshardError]]) -> None:
        self.results, self.failures = results, failures
        total = len(results) + len(failures)
        super().__init__(f"{len(failures)} of {total} jobs failed", "the same command does what is left of them")


def run_keeping_going(jobs: Sequence[Job], options: RunOptions) -> list[Result]:
    """As `run` with `skip_finished`, but a job that cannot run, or fails, keeps no other from its output.

    Jobs that can run share one pass. Should it fail underway, they go on one by one, each from its journal.

    Raises:
        RequestError: what is wrong lies between the jobs, or with all of them alike.
        SomeFailedError: some could not run or failed; the others are done.
    """
    planner = Planner(shard_cache(options))
    failures: list[tuple[Job, SafeshardError]] = []
    sound: list[Job] = []
    for job in jobs:
        try:
            plans = planner.plan([job], options.overwrite, skip_finished=True)
            if options.strict:
                refuse_cautions(plans)
            sound.append(job)
        except RequestError as error:
            failures.append((job, error))
    results: list[Result] = []
    try:
        results = run(sound, options, skip_finished=True, planner=planner) if sound else []
    except RunError:
        for job in sound:
            try:
                results += run([job], options, skip_finished=True)
            except SafeshardError as error:
                failures.append((job, error))
    if failures:
        raise SomeFailedError(results, failures)
    return results


def refuse_cautions(plans: Sequence[JobPlan]) -> None:
    """With --strict: refuse what is warned about before anything is written."""
    where = [(str(p.job.output if p.job.writes_model else p.job.method), each) for p in plans for each in p.cautions]
    if where:
        raise RequestError([Offence(place, c.text, remedy=c.remedy or "or leave out --strict") for place, c in where])


def _decided_cautions(job_run: JobRun) -> list[Caution]:
    return cautions(job_run) if job_run.writer else []


def _start(plans: Sequence[JobPlan], options: RunOptions, runs: list[JobRun]) -> None:
    """Add a run for each plan to `runs`, so that the caller can close those begun when another is refused."""
    refused: list[RequestError] = []
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # each job holds files open; 1024 end at 300 adapters
    for plan in plans:
        try:
            runs.append(_begin(plan, options))
        except RequestError as error:
            refused.append(error)
            if isinstance(error, HeldError):  # whoever holds the first holds the rest soon
                break
    if refused:
        offences = [offence for error in refused for offence in error.offences]
        raise (HeldError if all(isinstance(error, HeldError) for error in refused) else RequestError)(offences)


def _begin(plan: JobPlan, options: RunOptions) -> JobRun:
    if not plan.job.writes_model:
        return JobRun(plan)
    device = device_name(torch.device(options.resolved_device()))
    request = fingerprint(plan, device)
    if plan.part is not None:
        writer = part_writer(plan, request, options.overwrite)
    else:
        place = destination(plan.job, frozenset(file.name for file in plan.files))
        writer = Writer(plan.job.output, plan.files, request, options.overwrite, place)
    entries, cosines = _decided(plan, writer)
    fallbacks = list(writer.journal.sound("fallback", lambda record: Fallback(**record["entry"])))
    curves = {}
    if plan.job.target_leak is not None:
        records = writer.journal.sound("curve", lambda record: (record["name"], [float(x) for x in record["curve"]]))
        curves = {name: curve for name, curve in records if name in plan.modules}
    return JobRun(plan, writer, entries, cosines, fallbacks=fallbacks, curves=curves)


def _decided(plan: JobPlan, writer: Writer) -> tuple[dict[str, dict[str, Any]], dict[str, float | None]]:
    """Entries and cosines of the plan's modules that the journal holds, but for those whose tensors are damaged."""
    done = {
        entry.name: entry
        for entry in writer.journal.sound("module", lambda record: ModuleEntry(**record["entry"]))
        if entry.name in plan.modules
        and entry.effect is not None  # of an earlier version: a resumed job must say what an undisturbed one says
        and writer.hashes.keys() >= plan.modules[entry.name].outputs
    }
    scored = writer.journal.sound("cosine", lambda r: ModuleEntry(name=r["name"], decision="kept", cosine=r["cosine"]))
    cosines = {entry.name: entry.cosine for entry in (*done.values(), *scored) if entry.name in plan.modules}
    return {name: entry.model_dump(mode="json", exclude_none=True) for name, entry in done.items()}, cosines


def _refuse_changed(runs: Sequence[JobRun]) -> None:
    """Publish nothing that was made of files that changed meanwhile, nor go on from it later."""
    for job_run in runs:
        for opened in job_run.plan.inputs.values():
            for name in opened.source.changed() & {file.name for file in opened.files}:
                for other in runs:
                    if other.writer:
                        other.writer.discard()
                message = f"{opened.source.spec}/{name} changed while it was read: what came of it is discarded"
                raise RunError(message, "run the same command again once the file is at rest")


def _finish(job_run: JobRun, measured: Measured, options: RunOptions) -> Result:
    manifest = publish(job_run, measured, options.overwrite) if job_run.writer else None
    cosines = {name: job_run.cosines.get(name) for name in job_run.plan.modules}
    return Result(job_run.job, job_run.plan, manifest, cosines, job_run.untreated())
