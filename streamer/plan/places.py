"""Where jobs write: what is there already, each other's way, and room on the disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME, load
from safeshard.streamer.calibration.hidden_states import COPIES
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import JobPlan


def staging_of(output: Path) -> Path:
    """The folder beside an output that holds it while it is written."""
    return output.with_name(output.name + ".partial")


def is_half_copied(staging: Path, output: Path, last: str = MANIFEST_NAME) -> bool:
    """Whether a run was interrupted while it copied its finished output here; the whole is in the staging folder."""
    mark = output / JOURNAL_NAME
    ours = mark.is_file() and not mark.stat().st_size and (staging / JOURNAL_NAME).is_file()
    return ours and not (output / last).exists()


def output_offences(jobs: Sequence[Job], plans: Sequence[JobPlan], overwrite: bool) -> Iterator[Offence]:
    """Offences about where jobs write: what is there already, each other's way, and too small a disk."""
    need: dict[int, tuple[Path, int]] = {}  # by file system
    sizes = {id(plan.job): 0 if plan.finished else plan.bytes_to_write for plan in plans}
    for plan in {id(p.factors): p for p in reversed(plans) if p.factors and not p.finished}.values():
        assert plan.factors is not None
        sizes[id(plan.job)] += COPIES * plan.factors.hidden_bytes  # which lie beside the first of the jobs that share
    done = {id(plan.job) for plan in plans if plan.finished}
    paths = {id(job): _place(job.output) for job in jobs if job.writes_model}
    taken = Counter(paths.values()) + Counter(staging_of(path) for path in paths.values() if path.name)
    for job in (job for job in jobs if job.writes_model):
        path, shown = paths[id(job)], str(job.output)
        if taken[path] > 1 or any(parent in taken for parent in path.parents):
            yield Offence("--output", shown, "a folder of its own for each job", "another job's", "rename one")
        if unusable := list(place_offences(job.output, job.inputs().values())):
            yield from unusable
            continue
        if id(job) in done:
            continue
        if is_half_copied(staging_of(path), path):
            pass  # the run that goes on from the folder beside it puts it right
        elif os.path.lexists(path) and not overwrite:
            remedy = "choose another, or --overwrite"
            yield Offence("--output", shown, "a folder that does not exist", "it exists", remedy)
        elif os.path.lexists(path) and not _replaceable(path):
            got = "something that safeshard did not write"
            yield Offence("--output", shown, "an output of safeshard, to overwrite", got, "remove it yourself")
        parent = next(p for p in path.parents if p.exists())
        first, before = need.get(parent.stat().st_dev, (parent, 0))
        need[parent.stat().st_dev] = (first, before + sizes.get(id(job), 0) - taken_bytes(staging_of(path)))
    for parent, nbytes in need.values():
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            yield Offence(
                "--output", str(parent), f"{nbytes} bytes of free space", f"{free}", "free some, or choose another disk"
            )


def taken_bytes(staging: Path) -> int:
    """Bytes of the disk that an unfinished output has already."""
    return sum(p.stat().st_blocks * 512 for p in staging.iterdir()) if staging.is_dir() else 0


def _replaceable(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    try:
        return not any(path.iterdir()) or bool(load(path / MANIFEST_NAME))
    except RequestError:
        return False


def place_offences(output: Path, inputs: Iterable[str]) -> Iterator[Offence]:
    """Offences of a place to write a folder, whatever is there: across an input, or where nothing can be written."""
    path, shown = _place(output), str(output)
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
    except OSError as error:  # too long, not permitted
        got = error.strerror or "none"
    if got:
        yield Offence("--output", shown, "a folder to write", got, "choose another")


def _place(output: Path) -> Path:
    """Where an output goes, links and `..` on the way there followed. A link in its own place is not."""
    path = output.absolute()
    return Path(os.path.realpath(path.parent)) / path.name
