"""The parts of an output in a bucket: `PREFIX.parts/1-of-8/`, and what a worker brings there.

A bucket has no locks, so workers do not keep each other away: a file's name there is made of the hashes of its tensors.
Workers at one part bring the same file, or, should their machines round differently, files of different names; a record
speaks of those that its own worker brought. So nobody spoils what another has finished, and no condition is needed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from safeshard.manifests.errors import Offence, RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.manifest_text import MAX_MANIFEST_BYTES
from safeshard.manifests.schema import JOURNAL_NAME
from safeshard.streamer.disk import write_file
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import OutputFile
from safeshard.streamer.plan.ours import JOURNAL_MAGIC, NUMBERS, PART, PART_RECORD
from safeshard.streamer.plan.parts import Part as PartOf
from safeshard.streamer.plan.parts import parts_afar, parts_named
from safeshard.streamer.sources import Source
from safeshard.streamer.sources.bucket import BucketSource
from safeshard.streamer.sources.stores import BucketStore, Stored
from safeshard.streamer.write.destinations import Commit
from safeshard.streamer.write.journal import Journal, name_and_hash
from safeshard.streamer.write.part_record import Numbers, PartRecord, parse
from safeshard.streamer.write.shelf import FolderShelf, Shelf
from safeshard.streamer.write.staging import make_folder

T = TypeVar("T", bound=BaseModel)
_SMALL = {JOURNAL_NAME, PART_RECORD, NUMBERS}


def shelf_of(job: Job) -> Shelf:
    """Where the parts of a job's output are kept; no repository of the Hub keeps any."""
    return BucketShelf(job.output) if isinstance(job.output, str) else FolderShelf(job.output)


def content_name(file: OutputFile, hashes: Mapping[str, str]) -> str:
    """A file's name in a part's folder, which tells its content: made of its header and of its tensors' hashes."""
    told = json.dumps([hashes[name] for name in file.tensors]).encode()
    return f"{file.name}.{hash_bytes(file.header + told)[:32]}{PART}"


class BucketShelf:
    """The parts of an output in a bucket."""

    afar = True

    def __init__(self, url: str) -> None:
        self.url = parts_afar(url)
        self._seen: dict[str, Stored] = {}

    @cached_property
    def store(self) -> BucketStore:
        """The prefix that holds the folders of all parts."""
        return BucketStore(self.url)

    def names(self) -> dict[str, Stored]:
        """All that lies there, now."""
        self._seen = self.store.names()
        return self._seen

    def there(self) -> list[PartOf]:
        return parts_named({name.partition("/")[0] for name in self.names()})

    def offences(self) -> Iterator[Offence]:
        return iter(())  # what is not a part's is left alone

    def records(self, parts: Sequence[PartOf]) -> list[PartRecord | None]:
        return self._read(parts, PART_RECORD, PartRecord)

    def numbers(self, parts: Sequence[PartOf]) -> list[Numbers | None]:
        return self._read(parts, NUMBERS, Numbers)

    def _read(self, parts: Sequence[PartOf], name: str, model: type[T]) -> list[T | None]:
        names = self.names()
        wanted = [f"{part.name}/{name}" for part in parts]
        small = [each for each in wanted if each in names and names[each].size <= MAX_MANIFEST_BYTES]
        found = self.store.look_all(small)
        return [parse(look[0], model) if (look := found.get(each)) is not None else None for each in wanted]

    def leave(self, part: PartOf, numbers: Numbers, staging: Path) -> None:
        if self.numbers([part]) != [numbers]:
            self.store.put(f"{part.name}/{JOURNAL_NAME}", (staging / JOURNAL_NAME).read_bytes())
            self.store.put(f"{part.name}/{NUMBERS}", numbers.to_bytes())

    def is_whole(self, part: PartOf, files: Sequence[OutputFile], record: PartRecord) -> bool:
        return not self.missing(part, files, record.hashes, self._seen)

    def missing(
        self, part: PartOf, files: Iterable[OutputFile], hashes: Mapping[str, str], names: Mapping[str, Stored]
    ) -> list[str]:
        """The names of those files of a part that are not there, of all `names` there are."""
        sizes = {f"{part.name}/{content_name(file, hashes)}": file.nbytes for file in files}
        return sorted(name for name, size in sizes.items() if name not in names or names[name].size != size)

    def source(self, part: PartOf) -> Source:
        return BucketSource(f"{self.url}/{part.name}")

    def name_of(self, file: OutputFile, hashes: Mapping[str, str]) -> str:
        return content_name(file, hashes)

    def reopen(self, part: PartOf) -> None:
        self.store.delete([f"{part.name}/{PART_RECORD}"])

    def discard(self, part: PartOf) -> None:
        self._remove([part])

    def clear(self) -> None:
        self._remove(self.there())

    def _remove(self, parts: Sequence[PartOf]) -> None:
        folders = {part.name for part in parts}
        ours = [name for name in self.names() if _is_ours(name, folders)]
        records = [name for name in ours if name.endswith(f"/{PART_RECORD}")]
        self.store.delete_all(sorted(set(ours) - set(records)))
        self.store.delete_all(records)  # last: they tell that the output was made of these


def _is_ours(name: str, folders: set[str]) -> bool:
    folder, _, rest = name.partition("/")
    return folder in folders and (rest in _SMALL or (rest.endswith(PART) and "/" not in rest))


class ToShelf:
    """A part's way to its folder in a bucket."""

    frees = True

    def __init__(self, url: str, part: PartOf, files: Sequence[OutputFile]) -> None:
        self._shelf, self._part = BucketShelf(url), part
        self._files = {file.name: file for file in files}
        self.spec = f"{self._shelf.store.spec}/{part.name}"
        self._journal: Journal | None = None
        self._brought: list[str] = []
        self._lock = threading.Lock()

    def _named(self, name: str) -> str:
        return f"{self._part.name}/{name}"

    def recover(self, staging: Path) -> None:
        path = staging / JOURNAL_NAME
        if path.exists() or (found := self._shelf.store.look(self._named(JOURNAL_NAME))) is None:
            return
        if found[0].startswith(JOURNAL_MAGIC):
            make_folder(staging)
            write_file(path, found[0])

    def begin(self, journal: Journal | None) -> set[str]:
        assert journal is not None
        self._journal = journal
        self._mirror()
        hashes, names = self._hashes(), self._shelf.names()
        known = [file for file in self._files.values() if hashes.keys() >= file.tensors.keys()]
        return {file.name for file in known if not self._shelf.missing(self._part, [file], hashes, names)}

    def _hashes(self) -> dict[str, str]:
        assert self._journal is not None
        return dict(self._journal.sound("tensor", name_and_hash))

    def _mirror(self) -> None:
        """Let the journal there be as it is here."""
        assert self._journal is not None
        with self._lock:
            data = self._journal.path.read_bytes()
            self._shelf.store.put(self._named(JOURNAL_NAME), data[: data.rfind(b"\n") + 1])

    def upload(self, name: str, path: Path, commit: Commit) -> None:
        commit()  # the journal has the hashes then
        file = self._files[name]
        key = self._named(content_name(file, self._hashes()))
        self._shelf.store.upload(key, path, file.nbytes)
        self._brought.append(key)
        self._mirror()

    def publish(self, files: Mapping[str, Path]) -> None:
        self._mirror()
        if lost := self._shelf.missing(self._part, self._files.values(), self._hashes(), self._shelf.names()):
            raise RunError(f"{self._shelf.url}/{lost[0]} is gone", "run the part again")
        self._shelf.store.put(self._named(PART_RECORD), files[PART_RECORD].read_bytes())

    def forget(self) -> None:
        if self._journal is not None:
            self._shelf.store.delete_all([*self._brought, self._named(JOURNAL_NAME)])

    def stop(self) -> None:
        self._shelf.store.stop()
