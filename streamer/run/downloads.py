"""What a run will fetch from afar: bytes, requests, and the room that the Hub's cache needs for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from safeshard.manifests.errors import Offence
from safeshard.manifests.sizes import human
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.read import Read, Step
from safeshard.streamer.options import RunOptions
from safeshard.streamer.run.calibrated import planned_steps
from safeshard.streamer.run.flow.steps import copy_steps, module_steps
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.sources import PIECE, ShardCache, hub_cache


@dataclass(frozen=True)
class Download:
    """Bytes and requests from afar.

    `kept` is what the Hub's cache takes on, `largest` its largest shard; `held` are adapters that lie in the folder for
    temporary files as long as the run takes.
    """

    nbytes: int = 0
    requests: int = 0
    kept: int = 0
    largest: int = 0
    held: int = 0


def shard_cache(options: RunOptions) -> ShardCache:
    """The Hub's cache, as the options say: shards go there with `--cache` or `--cache-budget`."""
    budget = options.cache_budget
    return ShardCache(options.cache or budget is not None, None if budget is None else int(budget))


def download(runs: Sequence[JobRun]) -> Download:
    """What runs will fetch, as far as headers tell."""
    reads = {read.key: read for step in _steps(runs) for read in _reads(step)}
    forward = {read.key: read for job_run in runs for read in _forward(job_run)}
    return download_of([*reads.values(), *forward.values()])


def download_of(reads: Sequence[Read]) -> Download:
    """What reading of tensors fetches; one that is named twice is read twice."""
    sources = {read.source.identity: read.source for read in reads}
    whole = {(r.source.identity, r.ref.file) for r in reads if r.source.transfer(r.ref.file) == "whole"}
    sizes = [sources[place].sizes()[name] for place, name in whole]
    ranges = [r.ref.nbytes for r in reads if r.source.transfer(r.ref.file) == "ranges"]
    kept = [sources[place].sizes()[name] for place, name in whole if sources[place].keeps(name)]
    requests = sum(-(-nbytes // PIECE) for nbytes in (*sizes, *ranges))
    return Download(sum(sizes) + sum(ranges), requests, sum(kept), max(kept, default=0), held=sum(sizes) - sum(kept))


def download_offences(need: Download, options: RunOptions) -> Iterator[Offence]:
    """Offences of a budget that the largest shard exceeds, and of a disk that is too small."""
    budget = options.cache_budget
    if budget is not None and need.largest > budget:
        expected = f"at least {need.largest} bytes ({human(need.largest)}), the largest shard"
        yield Offence("--cache-budget", "", expected, human(budget), "raise it, or leave it out to read by ranges")
    if need.held > (free := shutil.disk_usage(tempfile.gettempdir()).free):
        expected = f"{need.held} bytes ({human(need.held)}) of free space for adapters from the Hub"
        yield Offence(tempfile.gettempdir(), "", expected, human(free), "set TMPDIR to a larger disk, or give --cache")
    if need.kept:
        folder = hub_cache()
        disk = next(place for place in (folder, *folder.parents) if place.exists())
        room, free = min(need.kept, budget or need.kept), shutil.disk_usage(disk).free
        if room > free:
            remedy = "free some (`hf cache rm`), set HF_HOME, give --cache-budget, or leave out --cache"
            yield Offence("--cache", str(folder), f"{room} bytes ({human(room)}) of free space", human(free), remedy)


def _forward(job_run: JobRun) -> Iterator[Read]:
    """What running the aligned model reads of it: all but the head."""
    if (factors := job_run.plan.factors) is not None and factors.forward_bytes:
        yield from forward_reads(job_run.plan.aligned)


def forward_reads(aligned: Checkpoint) -> Iterator[Read]:
    """What running a model reads: all but the head."""
    for name, ref in aligned.tensors.items():
        if not name.startswith("lm_head"):
            yield Read(aligned.source, ref)


def _steps(runs: Sequence[JobRun]) -> Iterable[Step]:
    return (*module_steps(runs), *copy_steps(runs), *planned_steps(runs))


def _reads(step: Step) -> Iterator[Read]:
    yield from step.reads.values()
    for task in step.tasks:
        yield from task.reads()
        if (copy := getattr(task, "copy", None)) is not None:  # which the writer reads itself
            yield Read(copy.source, copy.ref)
