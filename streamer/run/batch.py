"""A jobs file's jobs: in one pass here, as one part of several, or as all parts on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.options import RunOptions
from safeshard.streamer.plan.parts import MAX_PARTS, Part
from safeshard.streamer.plan.request.jobs_file import read_jobs
from safeshard.streamer.plan.written.afar import without_finished
from safeshard.streamer.run.result import Result
from safeshard.streamer.run.runner import run, run_keeping_going


def run_batch(
    file: Path,
    options: RunOptions,
    *,
    keep_going: bool,
    skip_finished: bool,
    note: Callable[[str], None],
    part: str | None,
    engine: str,
    parts: int | None,
) -> list[Result]:
    """Run the jobs of a file; see `safeshard.batch`.

    Raises:
        RequestError: the options do not go together, or some job cannot run.
    """
    share = _part(part, engine=engine, parts=parts, keep_going=keep_going)  # before the file, which may be large
    jobs = read_jobs(file)
    if skip_finished and options.overwrite:
        raise RequestError(Offence("--skip-finished", expected="one of the two", got="--overwrite too"))
    if skip_finished:
        left = without_finished(jobs)
        note(f"{len(jobs) - len(left)} of {len(jobs)} jobs are finished already")
        if not (jobs := left):
            return []
    if engine == "ray":
        from safeshard.streamer.run.ray_engine import run_on_ray

        return run_on_ray(jobs, options, parts)
    if share is not None:
        from safeshard.streamer.run.parts import run_part

        return run_part(jobs, options, share)
    return run_keeping_going(jobs, options) if keep_going else run(jobs, options, skip_finished=True)


def _part(part: str | None, *, engine: str, parts: int | None, keep_going: bool) -> Part | None:
    """The part that is asked for.

    Raises:
        RequestError: there is no such part, or it does not go with the other options.
    """
    offences: list[Offence] = []
    if engine not in ("local", "ray"):
        offences.append(Offence("--engine", "", "local or ray", repr(engine)))
    if part is not None and engine == "ray":
        offences.append(Offence("--part goes without --engine ray, which does every part"))
    if parts is not None and engine != "ray":
        offences.append(Offence("--parts goes with --engine ray; a worker of another cluster takes --part I/N"))
    if parts is not None and not 1 <= parts <= MAX_PARTS:
        offences.append(Offence("--parts", "", f"a number from 1 to {MAX_PARTS}", str(parts)))
    if keep_going and (part is not None or engine == "ray"):
        offences.append(Offence("--keep-going goes with a whole batch: all parts cut the same jobs"))
    if offences:
        raise RequestError(offences)
    return None if part is None else Part.parse(part)
