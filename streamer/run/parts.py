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
from safeshard.streamer.disk import clear_errors
from safeshard.streamer.methods.base import Job
from safeshard.streamer.options import RunOptions
from safeshard.streamer.plan.identity import fingerprint, finished
from safeshard.streamer.plan.job_plan import Copy, JobPlan
from safeshard.streamer.plan.ours import PART_RECORD
from safeshard.streamer.plan.parts import Part, parts_of, parts_there
from safeshard.streamer.plan.planner import Planner
from safeshard.streamer.plan.written.places import staging_of
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.cut import cut
from safeshard.streamer.run.downloads import shard_cache
from safeshard.streamer.run.ending.cautions import cautions
from safeshard.streamer.run.ending.finish import Measured, publish
from safeshard.streamer.run.flow.steps import JobRun
from safeshard.streamer.run.part_work import afar_offence, fingerprint_of
from safeshard.streamer.run.runner import Result, device_name, earlier, refuse_cautions, run
from safeshard.streamer.sources import LocalSource
from safeshard.streamer.write.journal import HeldError, differences
from safeshard.streamer.write.part_record import PartRecord, read_numbers, read_record
from safeshard.streamer.write.staging import part_of, remove, settle
from safeshard.streamer.write.writer import Writer

WAIT_SECONDS = 2.0  # until it is asked again whether the worker that holds a part has ended
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
    plans = Planner(shard_cache(options)).plan(jobs, options.overwrite, skip_finished=True)
    if offences := [afar_offence(plan) for plan in plans if plan.job.afar is not None]:
        raise RequestError(offences)
    for plan in plans:
        plan.finished = plan.finished or _gathered_before(plan)
    if options.strict:
        refuse_cautions(plans)
    left = [plan for plan in plans if not plan.finished]
    parts = _parts(left)
    shares = [own for own in zip(*cut(plans, parts), strict=True) if not own[0].finished] if parts else []
    _records(shares, options)
    for number, part in enumerate(parts):
        if not options.dry_run and any(_waits(own[number], parts) for own in shares):
            run_part(jobs, options, part, show)
    records = _records(shares, options)
    if options.dry_run:
        return [Result(plan.job, plan, None, {}) for plan in plans]
    found = zip(left, shares, records, strict=True)
    results = {id(plan): _gathered(plan, own, theirs, options) for plan, own, theirs in found}
    if doubtful := [text for result in results.values() if isinstance(result, list) for text in result]:
        raise RunError("; ".join(doubtful), "the same command without --strict finishes what is refused here")
    for plan in plans:
        if plan.finished:
            with clear_errors(plan.folder):
                settle(staging_of(plan.folder), plan.folder)
        _remove_parts(plan.folder)
    return [r if isinstance(r := results.get(id(plan)), Result) else earlier(plan) for plan in plans]


def _gathered_before(plan: JobPlan) -> Manifest | None:
    """The manifest of an output that was made of these very parts, or of parts that are gone: with --overwrite, too."""
    manifest, parts = finished(plan), parts_there(plan.folder)
    records = [read_record(part.folder(plan.folder)) for part in parts]
    same = manifest and any(record and record.run.start == manifest.run.start for record in records)
    return manifest if same or not parts else None


def _parts(plans: Sequence[JobPlan]) -> list[Part]:
    """All parts of the cut of which there are some.

    Raises:
        RequestError: there are none, or some of several cuts.
    """
    counts = {id(plan): {part.count for part in parts_there(plan.folder)} for plan in plans}
    every = sorted({count for own in counts.values() for count in own})
    offences = [Offence(str(p.folder), "", "its parts", "none", AGAIN) for p in plans if not counts[id(p)]]
    if len(every) > 1:
        got = f"parts of {' and of '.join(map(str, every))}"
        shown = [str(plan.folder) for plan in plans if counts[id(plan)]]
        remedy = "--part I/N with --overwrite discards those of another N"
        offences += [Offence(where, "", "parts of one cut", got, remedy) for where in shown]
    if offences:
        raise RequestError(offences)
    return Part.all(every[0]) if every else []


def _waits(share: JobPlan, parts: Sequence[Part]) -> bool:
    """Whether a part of an output needs the numbers of all parts, which are all there."""
    assert share.part is not None
    output = share.folder
    if not JobRun(share).waits or read_record(share.part.folder(output)) is not None:
        return False
    return all(read_numbers(part.folder(output)) is not None for part in parts)


def _records(shares: Sequence[Sequence[JobPlan]], options: RunOptions) -> list[list[PartRecord]]:
    """The records of all parts of each output, but for those that wait for the numbers of others.

    Raises:
        RequestError: some are missing, or of another request than the others.
    """
    device = device_name(torch.device(options.resolved_device()))
    found: list[list[PartRecord]] = []
    offences: list[Offence] = []
    for own in shares:
        records = [read_record(_folder(share)) for share in own]
        there = [record for record in records if record is not None]
        for share, record in zip(own, records, strict=True):
            where = f"{share.folder}: part {share.part}"
            if record is not None:
                offences += _differences(share, record, there[0])
            elif JobRun(share).waits and (numbers := read_numbers(_folder(share))) is not None:
                remedy = "finish where, and as, the parts were run; or run each once more"  # which decides, too
                offences += differences(where, numbers.fingerprint, fingerprint_of(share, device), remedy)
            else:
                got = "an unfinished one" if _folder(share).is_dir() else "none"
                offences.append(Offence(str(share.folder), str(share.part), "a finished part", got, AGAIN))
        found.append(there)
    if offences:
        raise RequestError(offences)
    return found


def _differences(share: JobPlan, record: PartRecord, first: PartRecord) -> Iterator[Offence]:
    """Where a part was made of something else than is asked for now, or otherwise than the first one was."""
    where, remedy = f"{share.folder}: part {share.part}", f"--part {share.part} --overwrite makes it anew"
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
            return [f"{plan.folder}: {each.text}" for each in found]
        device, wall = records[0].tool.device, time.perf_counter() - began
        manifest = publish(job_run, Measured(device, start, wall, 0, 0, 0, {}), options.overwrite, records)
        cosines = {entry.name: entry.cosine for entry in manifest.modules}
        return Result(plan.job, plan, manifest, cosines, job_run.untreated())
    finally:
        with contextlib.suppress(RunError):  # the run's own error says more
            writer.abandon()


def _writer(plan: JobPlan, shares: Sequence[JobPlan], records: Sequence[PartRecord], options: RunOptions) -> Writer:
    """The output's writer, with the shards that one part has written."""
    first = records[0].fingerprint
    whole = {file.name: file for file in plan.files}
    made = {
        file.name: part_of(_folder(share), file.name)
        for share in shares
        for file in share.files
        if file.header == whole[file.name].header
    }
    request: dict[str, Any] = fingerprint(plan, records[0].tool.device) | {"torch": first["torch"]}
    return Writer(plan.folder, plan.files, request, options.overwrite, made=made)


def _take_tensors(writer: Writer, shares: Sequence[JobPlan], records: Sequence[PartRecord]) -> None:
    """Let the output have every tensor of its parts: those of moved shards are there, the others are copied.

    Raises:
        RunError: what a part wrote is gone or damaged; that part is no longer finished.
    """
    headers = {file.name: file.header for file in writer.files}
    for share, record in zip(shares, records, strict=True):
        folder = _folder(share)
        try:
            for file in share.files:
                hashes = {name: record.hashes[name] for name in file.tensors}
                if file.header == headers[file.name]:
                    writer.adopt(hashes)
                else:
                    _copy(
                        writer,
                        folder,
                        file.name,
                        [r for n, r in file.tensors.items() if writer.hashes.get(n) != hashes[n]],
                    )
                if any(writer.hashes.get(name) != digest for name, digest in hashes.items()):
                    raise RunError(f"{part_of(folder, file.name)} is gone, or is not what was written there")
        except (RunError, RequestError, KeyError) as error:
            (folder / PART_RECORD).unlink(missing_ok=True)
            remedy = f"run the part again, --part {share.part}, then this command"
            raise RunError(f"{error}", remedy) from error


def _copy(writer: Writer, folder: Path, name: str, refs: Sequence[Any]) -> None:
    part = part_of(folder, name).name
    source = LocalSource(folder, str(folder))
    for ref in refs:
        writer.copy(Copy(ref.name, source, replace(ref, file=part)))


def _folder(share: JobPlan) -> Path:
    assert share.part is not None
    return share.part.folder(share.folder)


def _remove_parts(output: Path) -> None:
    for part in parts_there(output):
        remove(part.folder(output), part.folder(output))
    with contextlib.suppress(OSError):  # somebody else's is in it
        parts_of(output).rmdir()
