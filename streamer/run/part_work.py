"""A part of a batch: what may be cut, the numbers that parts exchange, and the end of one part of one output.

Where an output needs numbers of all of its modules (a ranking, a leak), each part leaves its own beside its journal.
Whoever finds those of all parts goes on; the others have done what they could, and are run once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import ModuleEntry
from safeshard.streamer.calibration.factor_files import SavedFactors
from safeshard.streamer.disk import clear_errors, sync_path, write_file
from safeshard.streamer.plan.identity import checks_of, fingerprint
from safeshard.streamer.plan.job_plan import JobPlan, OutputFile
from safeshard.streamer.plan.ours import NUMBERS, PART_RECORD
from safeshard.streamer.plan.parts import Part, parts_there, place_of_parts_offences
from safeshard.streamer.plan.written.places import staging_of
from safeshard.streamer.run.ending.finish import Measured, run_of, tool_versions
from safeshard.streamer.run.flow.steps import JobRun
from safeshard.streamer.write.journal import Journal, differences
from safeshard.streamer.write.part_record import Numbers, PartRecord, read_numbers, read_record
from safeshard.streamer.write.staging import part_of, remove


def part_offences(plans: Sequence[JobPlan], count: int, overwrite: bool) -> Iterator[Offence]:
    """Offences of jobs that cannot be cut into `count` parts."""
    for plan in (p for p in plans if not p.finished):
        shown = str(plan.job.output)
        if plan.job.afar is not None:
            yield afar_offence(plan)
            continue
        if plan.factors is not None and not isinstance(plan.factors, SavedFactors):
            expected, remedy = "--factors, which all parts read", "make them once: safeshard calibrate"
            yield Offence(shown, "--part", expected, "calibration data, for which the whole model runs", remedy)
        yield from place_of_parts_offences(plan.folder)
        if others := {each.count for each in parts_there(plan.folder) if each.count != count and not overwrite}:
            got = f"parts of {' and of '.join(map(str, sorted(others)))}"
            yield Offence(shown, "--part", f"one of {count} parts, as those there", got, "--overwrite starts anew")


def afar_offence(plan: JobPlan) -> Offence:
    """Parts are put together in a folder that all workers see."""
    remedy = "write to a shared folder, and bring what is finished to its place"
    return Offence(plan.job.afar or "", "parts of a batch", "an output in a folder", "one afar", remedy)


def discard_other_cuts(plan: JobPlan) -> None:
    """Remove the parts of other cuts, with --overwrite.

    Raises:
        HeldError: one is underway.
    """
    assert plan.part is not None
    for part in parts_there(plan.folder):
        folder = part.folder(plan.folder)
        if part.count != plan.part.count and (journal := folder / "journal.jsonl").is_file():
            with clear_errors(folder), Journal.claim(journal):
                remove(folder, folder)


def fingerprint_of(plan: JobPlan, device: str) -> dict[str, Any]:
    """A plan's fingerprint as it is found again in a file."""
    found: dict[str, Any] = json.loads(json.dumps(fingerprint(plan, device)))
    return found


def finished_part(plan: JobPlan, device: str) -> PartRecord | None:
    """The record of a part that this very request has finished; None where it has not, or where files are gone."""
    assert plan.part is not None
    folder = plan.part.folder(plan.folder)
    record = read_record(folder)
    if record is None or record.fingerprint != fingerprint_of(plan, device):
        return None
    places = (folder, staging_of(plan.folder))  # where `finish` was interrupted, it may have moved some
    there = all(any(_is_whole(part_of(place, file.name), file) for place in places) for file in plan.files)
    return record if there else None


def _is_whole(path: Path, file: OutputFile) -> bool:
    return path.is_file() and path.stat().st_size >= file.nbytes  # what many parts write to is larger


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
    if read_numbers(writer.staging) != own:
        with clear_errors(writer.staging):
            write_file(writer.staging / NUMBERS, own.to_bytes())
            sync_path(writer.staging)
    every = Part.all(plan.part.count)
    found = [each for part in every if (each := read_numbers(part.folder(plan.folder))) is not None]
    if len(found) < len(every):
        return
    offences = [o for part, each in zip(every, found, strict=True) for o in _unlike(job_run, part, each, own)]
    cosines = {name: cosine for each in found for name, cosine in each.cosines.items()}
    curves = {name: curve for each in found for name, curve in each.curves.items()}
    if not offences and max(len(cosines), len(curves)) != plan.shared:
        remedy = "run all parts again, with --overwrite"
        expected = f"numbers of {plan.shared} modules in all parts"
        offences = [Offence(str(plan.folder), "", expected, str(max(len(cosines), len(curves))), remedy)]
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
