"""A batch by many workers: each does a part; then all parts become the outputs that one process would have written.

Gathering computes nothing but what waited for the numbers of all parts. Shards that one part wrote are moved.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.schema import Manifest
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import RunOptions
from safeshard.streamer.plan.identity import fingerprint, finished
from safeshard.streamer.plan.job_plan import Copy, JobPlan, OutputFile
from safeshard.streamer.plan.parts import Part
from safeshard.streamer.plan.planner import Planner
from safeshard.streamer.plan.written.afar import There
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.cut import cut
from safeshard.streamer.run.downloads import shard_cache
from safeshard.streamer.run.ending.cautions import cautions
from safeshard.streamer.run.ending.finish import Measured, publish
from safeshard.streamer.run.ending.settled import settle_finished
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.run.one_pass import device_name
from safeshard.streamer.run.part_work import fingerprint_of, hub_offences, is_hub, settle_part
from safeshard.streamer.run.result import Result, earlier
from safeshard.streamer.run.runner import refuse_cautions, run
from safeshard.streamer.write.destinations import Made, destination
from safeshard.streamer.write.journal import HeldError, differences
from safeshard.streamer.write.part_record import PartRecord
from safeshard.streamer.write.shelf_afar import BucketShelf, content_name, shelf_of
from safeshard.streamer.write.staging import part_of
from safeshard.streamer.write.writer import Writer

WAIT_SECONDS = 2.0  # until it is asked again whether the worker that holds a part has ended
COPIED_AT_MOST = 5 << 30  # bytes that S3 copies in one request; larger shards go through this machine
AGAIN = "safeshard batch JOBS --part I/N for each"
log = logging.getLogger(__name__)
Show = Callable[[int, bool], Progress]


def run_part(jobs: Sequence[Job], options: RunOptions, part: Part, show: Show = Progress) -> list[Result]:
    """Do a part of a batch, unless it is done. Where another worker is at it, wait, and go on where that one ended.

    Raises:
        RequestError: some job cannot run, or cannot be cut; nothing was written.
        RunError: it failed underway; the same call resumes.
    """
    told = False
    while True:
        try:
            return run(jobs, options, skip_finished=True, part=part, show=show)
        except HeldError as held:
            if not told:
                log.warning("part %s waits: %s", part, held)
            told = True
            time.sleep(WAIT_SECONDS)


def gather(jobs: Sequence[Job], options: RunOptions, show: Show = Progress) -> list[Result]:
    """Put together what the parts of a batch did, and publish the outputs.

    What waited for the numbers of all parts is done first, part by part.

    Raises:
        RequestError: a part is missing or unfinished, or was made of something else; nothing was published.
        RunError: it failed underway; the same call resumes.
    """
    planner = Planner(shard_cache(options))
    plans = planner.plan(jobs, options.overwrite, skip_finished=True)
    if offences := list(hub_offences(plans)):
        raise RequestError(offences)
    for plan in plans:
        plan.finished = plan.finished or _gathered_before(plan, planner.there.get(str(plan.job.output)))
    if options.strict:
        refuse_cautions(plans)
    left = [plan for plan in plans if not plan.finished]
    parts = _parts(left)
    shares = [own for own in zip(*cut(plans, parts), strict=True) if not own[0].finished] if parts else []
    records = _records(shares, options)
    if options.dry_run:
        return [Result(plan.job, plan, None, {}) for plan in plans]
    if waiting := [number for number in range(len(parts)) if any(own[number] is None for own in records)]:
        for number in waiting:
            run_part(jobs, options, parts[number], show)
        records = _records(shares, options, may_wait=False)
    found = zip(left, shares, [[each for each in own if each is not None] for own in records], strict=True)
    results = {id(plan): _gathered(plan, own, theirs, options) for plan, own, theirs in found}
    if doubtful := [text for result in results.values() if isinstance(result, list) for text in result]:
        raise RunError("; ".join(doubtful), "the same command without --strict finishes what is refused here")
    for plan in plans:
        if plan.finished:
            settle_finished(plan)
        if not is_hub(plan):
            shelf_of(plan.job).clear()
    for share in (each for own in shares for each in own):
        settle_part(share)
    return [r if isinstance(r := results.get(id(plan)), Result) else earlier(plan) for plan in plans]


def _gathered_before(plan: JobPlan, there: There | None) -> Manifest | None:
    """The manifest of an output that was made of these very parts, or of parts that are gone: with --overwrite, too.

    `there` is what lies at the place of an output afar.
    """
    if (manifest := finished(plan, there)) is None:
        return None
    shelf = shelf_of(plan.job)
    parts = shelf.there()
    same = any(record and record.run.start == manifest.run.start for record in shelf.records(parts))
    return manifest if same or not parts else None


def _parts(plans: Sequence[JobPlan]) -> list[Part]:
    """All parts of the cut of which there are some.

    Raises:
        RequestError: there are none, or some of several cuts.
    """
    counts = {id(plan): {part.count for part in shelf_of(plan.job).there()} for plan in plans}
    every = sorted({count for own in counts.values() for count in own})
    offences = [Offence(str(p.job.output), "", "its parts", "none", AGAIN) for p in plans if not counts[id(p)]]
    if len(every) > 1:
        got = f"parts of {' and of '.join(map(str, every))}"
        shown = [str(plan.job.output) for plan in plans if counts[id(plan)]]
        remedy = "--part I/N with --overwrite discards those of another N"
        offences += [Offence(where, "", "parts of one cut", got, remedy) for where in shown]
    if offences:
        raise RequestError(offences)
    return Part.all(every[0]) if every else []


def _records(
    shares: Sequence[Sequence[JobPlan]], options: RunOptions, may_wait: bool = True
) -> list[list[PartRecord | None]]:
    """The records of all parts of each output; None of those that wait for numbers, which are all there.

    Raises:
        RequestError: some are missing, or of another request than the others.
    """
    device = device_name(torch.device(options.resolved_device()))
    found: list[list[PartRecord | None]] = []
    offences: list[Offence] = []
    for own in shares:
        shelf, parts = shelf_of(own[0].job), [_part(share) for share in own]
        records = shelf.records(parts)
        begun = shelf.there() if None in records else []
        measured = shelf.numbers(parts) if None in records else [None] * len(parts)
        there = [record for record in records if record is not None]
        for share, record, numbers in zip(own, records, measured, strict=True):
            output = str(share.job.output)
            where = f"{output}: part {share.part}"
            if record is not None and not (shelf.afar and not shelf.is_whole(_part(share), share.files, record)):
                offences += _differences(share, record, there[0])
            elif record is not None:
                offences.append(Offence(output, str(share.part), "a finished part", "one whose files are gone", AGAIN))
            elif JobRun(share).waits and numbers is not None and may_wait:
                remedy = "finish where, and as, the parts were run; or run each once more"  # which decides, too
                offences += differences(where, numbers.fingerprint, fingerprint_of(share, device), remedy)
            else:
                got = "an unfinished one" if share.part in begun else "none"
                offences.append(Offence(output, str(share.part), "a finished part", got, AGAIN))
        found.append(records)
    if offences:
        raise RequestError(offences)
    return found


def _differences(share: JobPlan, record: PartRecord, first: PartRecord) -> Iterator[Offence]:
    """Where a part was made of something else than is asked for now, or otherwise than the first one was."""
    where, remedy = f"{share.job.output}: part {share.part}", f"--part {share.part} --overwrite makes it anew"
    expected = fingerprint_of(share, first.tool.device) | {"torch": first.fingerprint.get("torch")}
    expected["part"], theirs = str(share.part), dict(record.fingerprint)
    theirs["part"], own = theirs.get("part", {}).get("part"), theirs.get("part", {}).get("cut")
    yield from differences(where, expected, theirs, remedy)
    if own != fingerprint_of(share, first.tool.device)["part"]["cut"]:
        yield Offence(where, "jobs", "a part of these jobs", "one of other jobs", remedy)


def _gathered(
    plan: JobPlan, shares: Sequence[JobPlan], records: Sequence[PartRecord], options: RunOptions
) -> Result | list[str]:
    """Publish one output of its parts; or, with --strict, what speaks against it."""
    start, began = datetime.now(timezone.utc), time.perf_counter()
    job_run = JobRun(plan, _writer(plan, shares, records, options))
    writer = job_run.writer
    assert writer is not None
    try:
        _take_tensors(writer, shares, records)
        for record in records:
            entries = (entry.model_dump(mode="json", exclude_none=True) for entry in record.modules)
            job_run.entries |= {entry["name"]: entry for entry in entries}
            job_run.fallbacks += record.fallbacks
        if options.strict and (found := cautions(job_run)):
            return [f"{plan.job.output}: {each.text}" for each in found]
        device, wall = records[0].tool.device, time.perf_counter() - began
        manifest = publish(job_run, Measured(device, start, wall, 0, 0, 0, {}), options.overwrite, records)
        cosines = {entry.name: entry.cosine for entry in manifest.modules}
        return Result(plan.job, plan, manifest, cosines, job_run.untreated())
    finally:
        with contextlib.suppress(RunError):  # the run's own error says more
            writer.abandon()


def _writer(plan: JobPlan, shares: Sequence[JobPlan], records: Sequence[PartRecord], options: RunOptions) -> Writer:
    """The output's writer, with the shards that one part has written."""
    request: dict[str, Any] = fingerprint(plan, records[0].tool.device) | {"torch": records[0].fingerprint["torch"]}
    headers = {file.name: file.header for file in plan.files}
    whole = {f.name: (share, f, record) for share, f, record in _files(shares, records) if f.header == headers[f.name]}
    names, output = frozenset(headers), plan.job.output
    if isinstance(output, Path):
        made = {name: part_of(_part(share).folder(output), name) for name, (share, _, _) in whole.items()}
        return Writer(output, plan.files, request, options.overwrite, destination(plan.job, names), made=made)
    shelf = BucketShelf(output)
    hashes = {name: digest for record in records for name, digest in record.hashes.items()}
    there = {
        name: (f"{_part(share).name}/{shelf.name_of(file, record.hashes)}", file.nbytes)
        for name, (share, file, record) in whole.items()
        if file.nbytes <= COPIED_AT_MOST
    }
    taken = Made(shelf.store, {file.name: content_name(file, hashes) for file in plan.files}, there)
    return Writer(output, plan.files, request, options.overwrite, destination(plan.job, names, taken))


def _files(
    shares: Sequence[JobPlan], records: Sequence[PartRecord]
) -> Iterator[tuple[JobPlan, OutputFile, PartRecord]]:
    """Every file of every part."""
    for share, record in zip(shares, records, strict=True):
        yield from ((share, file, record) for file in share.files)


def _take_tensors(writer: Writer, shares: Sequence[JobPlan], records: Sequence[PartRecord]) -> None:
    """Let the output have every tensor of its parts: those of shards that are there are, the others are copied.

    Raises:
        RunError: what a part wrote is gone or damaged; that part is no longer finished.
    """
    headers = {file.name: file.header for file in writer.files}
    shelf = shelf_of(shares[0].job)
    for share, file, record in _files(shares, records):
        part = _part(share)
        try:
            hashes = {name: record.hashes[name] for name in file.tensors}
            if file.header == headers[file.name]:
                writer.adopt(hashes)
            left = [ref for name, ref in file.tensors.items() if writer.hashes.get(name) != hashes[name]]
            if left and (shelf.afar or file.header != headers[file.name]):
                source, name = shelf.source(part), shelf.name_of(file, hashes)
                for ref in left:
                    writer.copy(Copy(ref.name, source, replace(ref, file=name)))
            if any(writer.hashes.get(name) != digest for name, digest in hashes.items()):
                where = f"{share.job.output}: {file.name} of part {part}"
                raise _NotWhatWasWrittenError(f"{where} is gone, or is not what was written there")
        except (RunError, RequestError, KeyError) as error:
            if not shelf.afar or isinstance(error, _NotWhatWasWrittenError):  # a network's fault is not the part's
                shelf.reopen(part)
            remedy = f"run the part again, --part {part}, then this command"
            raise RunError(f"{error}", remedy) from error


class _NotWhatWasWrittenError(RunError):
    """A part's file is gone, or its tensors have other hashes than its record."""


def _part(share: JobPlan) -> Part:
    assert share.part is not None
    return share.part
