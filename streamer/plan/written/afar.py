"""Outputs afar: what lies in a bucket's prefix or a Hub repository already, whose it is, and what is in its way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from safeshard.manifests.errors import Offence, RequestError, RunError, SafeshardError
from safeshard.manifests.manifest_text import MAX_MANIFEST_BYTES
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME, Manifest
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan import ours
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.sources import side_by_side
from safeshard.streamer.sources.stores import Store, Stored, open_store

SHARDS_HERE = 4  # of an output in a bucket, the shards that the work folder holds at a time, about
MAX_JOURNAL_BYTES = 1 << 28  # of a million tensors it is about 200 MB
REPLACED_KIND = "replaced"  # of the journal's record that names the files of an output to be replaced
_ALWAYS = {JOURNAL_NAME, MANIFEST_NAME, "README.md", "report.html", ".gitattributes"}


def work_folder() -> Path:
    """Where outputs for places afar are put together: `SAFESHARD_WORK`, or a folder of the user's cache."""
    if chosen := os.environ.get("SAFESHARD_WORK"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).absolute() / "safeshard" / "outputs"


def staging_afar(url: str) -> Path:
    """The folder on this machine in which an output for a place afar is put together."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return work_folder() / f"{PurePosixPath(url).name}-{digest}.partial"


@dataclass(frozen=True)
class There:
    """What lies at a place afar: names, and the marks that say whose it is."""

    spec: str
    names: Mapping[str, Stored]
    journal: bytes | None = None
    manifest_text: bytes | None = None

    @classmethod
    def look(cls, store: Store) -> There:
        """Look at a place.

        Raises:
            RunError: it cannot be listed or read, or a mark there is larger than ours are.
        """
        names = store.names()
        for name, most in ((JOURNAL_NAME, MAX_JOURNAL_BYTES), (MANIFEST_NAME, MAX_MANIFEST_BYTES)):
            if name in names and names[name].size > most:
                raise RunError(
                    f"{store.spec}/{name} has more than {most} bytes: it is not ours", "choose another place"
                )
        journal, manifest = (store.read(name) if name in names else None for name in (JOURNAL_NAME, MANIFEST_NAME))
        return cls(store.spec, names, journal, manifest)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest, where there is a sound one."""
        try:
            return None if self.manifest_text is None else Manifest.from_json(self.manifest_text)
        except RequestError:
            return None

    @property
    def is_whole(self) -> bool:
        """Whether all that the manifest names is there, by size."""
        files = self.manifest.files if self.manifest is not None else ()
        return bool(files) and all(f.name in self.names and self.names[f.name].size == f.size for f in files)

    @property
    def marked(self) -> bool:
        """Whether it is an output of safeshard, finished or not."""
        return self.manifest is not None or (self.journal or b"").startswith(ours.JOURNAL_MAGIC)

    def strangers(self) -> list[str]:
        """What is not ours there."""
        known = {file.name for file in self.manifest.files} if self.manifest is not None else set()
        if self.journal is not None:
            known |= ours.files_of_journal(self.journal, REPLACED_KIND)
        marks = _ALWAYS if self.marked else {".gitattributes"}
        return sorted(n for n in self.names.keys() - known - marks if not (self.marked and ours.USUAL.fullmatch(n)))

    def offences(self, overwrite: bool) -> Iterator[Offence]:
        """What keeps a job from writing there."""
        foreign = self.strangers()
        if foreign and not self.marked:
            got = f"what safeshard did not write: {ours.listed(foreign)}"
            yield Offence("--output", self.spec, "an empty place, or an output of safeshard", got, "choose another")
        elif foreign:
            got = f"one that also holds {ours.listed(foreign)}"
            yield Offence("--output", self.spec, "an output of safeshard", got, "move that elsewhere")
        elif self.manifest is not None and not overwrite:
            remedy = "choose another, or --overwrite"
            yield Offence("--output", self.spec, "a place with no finished output", "one is there", remedy)


def look_at(urls: Iterable[str]) -> tuple[dict[str, There], list[Offence]]:
    """What lies at each of some outputs' places, and the offences of those that cannot be looked at."""
    stores, refused = _opened(urls)

    def look(store: Store) -> There | list[Offence]:
        try:
            return There.look(store)
        except RequestError as error:
            return list(error.offences)
        except RunError as error:
            return [Offence(error.message, remedy=error.remedy)]

    found: dict[str, There] = {}
    offences = [offence for each in refused.values() for offence in each]
    for url, there in zip(stores, side_by_side(look, stores.values(), stores.values()), strict=True):
        if isinstance(there, There):
            found[url] = there
        else:
            offences += there
    return found, offences


def without_finished(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose outputs are not finished yet, whatever those that are were made of."""
    stores, _ = _opened(job.afar for job in jobs if job.afar is not None)  # what is refused the plan says

    def is_finished(job: Job) -> bool:
        if not isinstance(job.output, str) and not (job.output / MANIFEST_NAME).is_file():
            return False
        if job.afar is None:
            return True
        try:
            return job.afar in stores and MANIFEST_NAME in stores[job.afar].names()
        except SafeshardError:  # which the plan says
            return False

    done = side_by_side(is_finished, jobs, stores.values())
    return [job for job, finished in zip(jobs, done, strict=True) if not finished]


def _opened(urls: Iterable[str]) -> tuple[dict[str, Store], dict[str, list[Offence]]]:
    """The stores behind some outputs' URLs, before anything is asked of them: all can be given up at a signal."""
    stores: dict[str, Store] = {}
    refused: dict[str, list[Offence]] = {}
    for url in dict.fromkeys(urls):
        try:
            stores[url] = open_store(url)
        except RequestError as error:
            refused[url] = list(error.offences)
    return stores, refused


def across(url: str, inputs: Iterable[str]) -> Iterator[Offence]:
    """Offences of an output that would lie across an input."""
    path = PurePosixPath(url)
    for place in inputs:
        other = PurePosixPath(place if "://" in place else f"hf://{place}") if not Path(place).exists() else None
        if other is not None and (path == other or path in other.parents or other in path.parents):
            yield Offence("--output", url, "a place apart from the inputs", "one in their way", "choose another")
            return


def bytes_here(plan: JobPlan) -> int:
    """Bytes of this machine's disk that a plan's output takes while it is written."""
    sizes = sorted((file.nbytes for file in plan.files), reverse=True)
    in_bucket = isinstance(plan.job.output, str) and not plan.job.output.startswith("hf://")
    return sum(sizes[:SHARDS_HERE] if in_bucket else sizes) + sum(file.size for file in plan.side_files)
