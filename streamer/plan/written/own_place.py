"""The place that each job writes to, and jobs that write to the same."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from safeshard.manifests.errors import Offence
from safeshard.manifests.manifest_text import UNFINISHED
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.parts import parts_of
from safeshard.streamer.plan.written.afar import staging_afar


def place_of(output: Path | str) -> Path:
    """Where an output goes, links and `..` on the way there followed. A link in its own place is not.

    Of one afar it is a path that no local one equals.
    """
    if isinstance(output, str):
        return Path(output)
    path = output.absolute()
    return Path(os.path.realpath(path.parent)) / path.name


def staging_of(output: Path | str) -> Path:
    """The folder that holds an output while it is written: beside it, or of one afar in the work folder."""
    return staging_afar(output) if isinstance(output, str) else output.with_name(output.name + UNFINISHED)


def shared_offences(jobs: Iterable[Job]) -> Iterator[Offence]:
    """Offences of jobs that write where another one does, or into it."""
    writing = [(job, place_of(job.output)) for job in jobs if job.writes_model]
    beside = [place for _, path in writing if path.name for place in (staging_of(path), parts_of(path))]
    taken = Counter(path for _, path in writing) + Counter(beside)
    pushed = Counter(job.afar for job, _ in writing if job.afar)
    for job, path in writing:
        if taken[path] > 1 or pushed[job.afar or ""] > 1 or any(parent in taken for parent in path.parents):
            expected = "a folder of its own for each job"
            yield Offence("--output", str(job.output), expected, "another job's", "rename one")
