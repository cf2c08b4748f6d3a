"""A part of a batch: what may be cut, the numbers that parts exchange, and the end of one part of one output.

Where an output needs numbers of all of its modules (a ranking, a leak), each part leaves its own beside its journal.
Whoever finds those of all parts goes on; the others have done what they could, and are run once more.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import JOURNAL_NAME, ModuleEntry
from safeshard.streamer.calibration.factor_files import SavedFactors
from safeshard.streamer.plan.identity import checks_of, fingerprint
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.ours import PART_RECORD
from safeshard.streamer.plan.parts import Part, parts_afar
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.run.ending.finish import Measured, run_of, tool_versions
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.write.journal import HeldError, Journal, differences
from safeshard.streamer.write.part_record import Numbers, PartRecord
from safeshard.streamer.write.shelf_afar import ToShelf, shelf_of
from safeshard.streamer.write.staging import remove
from safeshard.streamer.write.writer import Writer


def part_offences(plans: Sequence[JobPlan], count: int, overwrite: bool) -> Iterator[Offence]:
    """Offences of jobs that cannot be cut into `count` parts."""
    yield from hub_offences(plans)
    for plan in (p for p in plans if not p.finished and not is_hub(p)):
        shown, shelf = str(plan.job.output), shelf_of(plan.job)
        if plan.factors is not None and not isinstance(plan.factors, SavedFactors):
            expected, remedy = "--factors, which all parts read", "make them once: safeshard calibrate"
            yield Offence(shown, "--part", expected, "calibration data, for which the whole model runs", remedy)
        yield from shelf.offences()
        if others := {each.count for each in shelf.there() if each.count != count and not overwrite}:
            got = f"parts of {' and of '.join(map(str, sorted(others)))}"
            yield Offence(shown, "--part", f"one of {count} parts, as those there", got, "--overwrite starts anew")


def hub_offences(plans: Sequence[JobPlan]) -> Iterator[Offence]:
    """Offences of outputs whose parts have no place: a repository of the Hub shows nothing before its one commit."""
    remedy = "give a folder that all workers see, and push: `finish` then pushes what it put together"
    for plan in (p for p in plans if not p.finished and is_hub(p)):
        expected = "an output in a folder or a bucket"
        yield Offence(str(plan.job.output), "parts of a batch", expected, "a repository of the Hub", remedy)


def is_hub(plan: JobPlan) -> bool:
    """Whether an output goes to a repository of the Hub, and to no folder."""
    return isinstance(plan.job.output, str) and plan.job.output.startswith("hf://")


def part_writer(plan: JobPlan, request: dict[str, Any], overwrite: bool) -> Writer:
    """The writer of a part of an output, to a folder beside it."""
    assert plan.part is not None
    output = plan.job.output
    if isinstance(output, Path):
        return Writer(output, plan.files, request, overwrite, folder=plan.part.folder(output))
    place = ToShelf(output, plan.part, plan.files)
    return Writer(_url(output, plan.part), plan.files, request, overwrite, place)


def settle_part(plan: JobPlan) -> None:
    """Remove the work folder, on this machine, of a part in a bucket that is finished: its worker went no further."""
    output = plan.job.output
    if plan.part is None or isinstance(output, Path):
        return
    staging = staging_of(_url(output, plan.part))
    if (staging / JOURNAL_NAME).is_file():
        with contextlib.suppress(HeldError), Journal.claim(staging / JOURNAL_NAME):  # held: its worker is at it
            remove(staging, staging)


def _url(output: str, part: Part) -> str:
    return f"{parts_afar(output)}/{part.name}"


def discard_other_cuts(plan: JobPlan) -> None:
    """Remove the parts of other cuts, with --overwrite.

    Raises:
        HeldError: one is underway.
    """
    assert plan.part is not None
    shelf = shelf_of(plan.job)
    for part in shelf.there():
        if part.count != plan.part.count:
            shelf.discard(part)


def fingerprint_of(plan: JobPlan, device: str) -> dict[str, Any]:
    """A plan's fingerprint as it is found again in a file."""
    found: dict[str, Any] = json.loads(json.dumps(fingerprint(plan, device)))
    return found


def finished_part(plan: JobPlan, device: str) -> PartRecord | None:
    """The record of a part that this very request has finished; None where it has not, or where files are gone."""
    assert plan.part is not None
    shelf = shelf_of(plan.job)
    (record,) = shelf.records([plan.part])
    if record is None or record.fingerprint != fingerprint_of(plan, device):
        return None
    return record if shelf.is_whole(plan.part, plan.files, record) else None


def know_from_parts(job_run: JobRun) -> None:
    """Leave a part's numbers for the others, and let it go on if those of all parts are there.

    Raises:
        RequestError: those of another part are of something else.
    """
    plan, writer = job_run.plan, job_run.writer
    assert plan.part is not None
    assert writer is not None
    own = Numbers(
        fingerprint=writer.fingerprint,
        cosines={name: job_run.cosines[name] for name in plan.modules} if job_run.job.ranks_first else {},
        curves={name: tuple(job_run.curves[name]) for name in plan.modules if name in job_run.curves},
    )
    writer.commit()
    shelf, every = shelf_of(plan.job), Part.all(plan.part.count)
    shelf.leave(plan.part, own, writer.staging)
    found = [each for each in shelf.numbers(every) if each is not None]
    if len(found) < len(every):
        return
    offences = [o for part, each in zip(every, found, strict=True) for o in _unlike(job_run, part, each, own)]
    cosines = {name: cosine for each in found for name, cosine in each.cosines.items()}
    curves = {name: curve for each in found for name, curve in each.curves.items()}
    if not offences and max(len(cosines), len(curves)) != plan.shared:
        remedy = "run all parts again, with --overwrite"
        expected = f"numbers of {plan.shared} modules in all parts"
        offences = [Offence(str(plan.job.output), "", expected, str(max(len(cosines), len(curves))), remedy)]
    if offences:
        raise RequestError(offences)
    job_run.know(cosines, curves)


def _unlike(job_run: JobRun, part: Part, numbers: Numbers, own: Numbers) -> Iterator[Offence]:
    """Where the numbers of a part are of something else: another input, another option, another machine."""
    theirs, ours = ({k: v for k, v in n.fingerprint.items() if k not in ("part", "files")} for n in (numbers, own))
    remedy = f"--part {part} --overwrite makes it anew"
    yield from differences(f"{job_run.job.output}: part {part}", ours, theirs, remedy)


def end_part(job_run: JobRun, measured: Measured) -> PartRecord:
    """Complete a part of an output, whose tensors are all written, by its record."""
    plan, writer = job_run.plan, job_run.writer
    assert writer is not None
    writer.complete()
    record = PartRecord(
        fingerprint=writer.fingerprint,
        tool=tool_versions(measured.device),
        modules=tuple(ModuleEntry(**job_run.entries[name]) for name in plan.modules),
        hashes=dict(writer.hashes),
        fallbacks=tuple(job_run.fallbacks),
        checked=checks_of(plan),
        run=run_of(measured, writer),
    )
    writer.add_file(PART_RECORD, record.to_bytes())
    writer.end_part()
    return record
