"""Where jobs write: what is there already, each other's way, and room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME
from safeshard.streamer.calibration.hidden_states import COPIES
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan import ours
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.parts import parts_of
from safeshard.streamer.plan.written.afar import There, across, bytes_here
from safeshard.streamer.plan.written.own_place import place_of, shared_offences, staging_of

ANOTHER = "choose another, or --overwrite"


def is_half_copied(staging: Path, output: Path, last: str = MANIFEST_NAME) -> bool:
    """Whether a run was interrupted while it copied its finished output here; the whole is in the staging folder."""
    copied = (staging / JOURNAL_NAME).is_file() and ours.is_copy(output) and not (output / last).exists()
    return copied and ours.strangers(output) == []


def unfinished_offences(staging: Path) -> Iterator[Offence]:
    """Offences of what lies where an output is to be written before it gets its name."""
    foreign = ours.strangers(staging)
    expected = "an unfinished output of safeshard, and nothing else"
    if os.path.lexists(staging) and foreign is None:
        got = (
            "another folder, which safeshard did not write"
            if staging.is_dir() and not staging.is_symlink()
            else "a file or a link"
        )
        yield Offence(str(staging), "", expected, got, "remove it yourself")
    elif foreign:
        yield Offence(str(staging), "", expected, f"also {ours.listed(foreign)}", "move it elsewhere")


def output_offences(
    jobs: Sequence[Job], plans: Sequence[JobPlan], overwrite: bool, there: Mapping[str, There]
) -> Iterator[Offence]:
    """Offences about where jobs write: what is there already, each other's way, and too small a disk.

    `there` is what lies at the places afar.
    """
    need: dict[int, tuple[Path, int]] = {}  # by file system
    sizes = {id(plan.job): 0 if plan.finished else bytes_here(plan) for plan in plans}
    for plan in {id(p.factors): p for p in reversed(plans) if p.factors and not p.finished}.values():
        assert plan.factors is not None
        sizes[id(plan.job)] += COPIES * plan.factors.hidden_bytes  # which lie beside the first of the jobs that share
    done = {id(plan.job) for plan in plans if plan.finished}
    yield from shared_offences(jobs)
    for job in (job for job in jobs if job.writes_model):
        path, shown = place_of(job.output), str(job.output)
        if isinstance(job.output, str):
            unusable = list(across(job.output, job.inputs().values()))
            unusable += place_offences(staging_of(job.output), ())
        else:
            unusable = list(place_offences(job.output, job.inputs().values()))
        yield from unusable
        if unusable or id(job) in done:
            continue
        staging = staging_of(job.output if isinstance(job.output, str) else path)
        yield from unfinished_offences(staging)
        if job.afar is not None and job.afar in there:
            yield from there[job.afar].offences(overwrite)
        if isinstance(job.output, str):
            pass
        elif is_half_copied(staging, path):
            pass  # the run that goes on from the folder beside it puts it right
        elif os.path.lexists(path) and not overwrite:
            yield Offence("--output", shown, "a new folder", "one that exists already", ANOTHER)
        elif os.path.lexists(path):
            yield from kept_offences(path, shown)
        parent = next(p for p in staging.parents if p.exists())
        first, before = need.get(parent.stat().st_dev, (parent, 0))
        taken_already = taken_bytes(job.output if isinstance(job.output, str) else path)
        need[parent.stat().st_dev] = (first, before + sizes.get(id(job), 0) - taken_already)
    for parent, nbytes in need.values():
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            remedy = "free some, or choose another disk" + " (SAFESHARD_WORK, of an output afar)" * bool(there)
            yield Offence("--output", str(parent), f"{nbytes} bytes of free space", f"{free}", remedy)


def taken_bytes(output: Path | str) -> int:
    """Bytes of the disk that an unfinished output has already, or its parts."""
    files = [*staging_of(output).glob("*")]
    if isinstance(output, Path):
        files += parts_of(output).glob("*/*")
    return sum(path.lstat().st_blocks * 512 for path in files)


def kept_offences(path: Path, place: str, last: str = MANIFEST_NAME) -> Iterator[Offence]:
    """Offences of a folder that --overwrite cannot replace: it is no output, or there is more in it than that.

    `last` is the file without which no output of the kind is complete.
    """
    foreign = ours.strangers(path)
    expected = "an output of safeshard, to overwrite"
    if foreign is None or not (foreign or (path / last).is_file() or not any(path.iterdir())):
        yield Offence("--output", place, expected, "something that safeshard did not write", "remove it yourself")
    elif foreign:
        yield Offence("--output", place, expected, f"one that also holds {ours.listed(foreign)}", "move it elsewhere")


def place_offences(output: Path, inputs: Iterable[str]) -> Iterator[Offence]:
    """Offences of a place to write a folder, whatever is there: across an input, or where nothing can be written."""
    path, shown = place_of(output), str(output)
    if path.name in ("", ".."):
        yield Offence("--output", shown, "a folder with a name", "none", "choose another")
        return
    folders = [Path(os.path.realpath(place)) for place in inputs if Path(place).is_dir()]
    target = Path(os.path.realpath(path))
    if any(target == folder or target in folder.parents or folder in target.parents for folder in folders):
        yield Offence("--output", shown, "a folder apart from the inputs", "one in their way", "choose another")
        return
    try:
        staging_of(path).exists()
        parent = next(p for p in path.parents if p.exists())
        got = "" if os.access(parent, os.W_OK | os.X_OK) else f"no right to write to {parent}"
        if not parent.is_dir():
            got = f"{parent} is a file"
        longest = max(len(os.fsencode(name)) for name in staging_of(path).relative_to(parent).parts)
        if parent.is_dir() and longest > os.pathconf(parent, "PC_NAME_MAX"):
            got = os.strerror(errno.ENAMETOOLONG)  # below a folder that is yet to be made the system does not say so
    except OSError as error:  # too long, not permitted
        got = error.strerror or "none"
    if got:
        yield Offence("--output", shown, "a folder to write", got, "choose another")
