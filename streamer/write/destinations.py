"""Where the files of an output go afar while it is written: a bucket's prefix, or a repository of the Hub.

In a bucket the journal is the first object to come and the last to go, and each change of it is put on the condition
that nobody else changed it: of two runs the one that began later goes on, and the other one ends. The manifest comes
when all else is there and is what was written. A repository of the Hub gets everything in one commit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safeshard.manifests.errors import RunError
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME
from safeshard.streamer.disk import write_file
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan import ours
from safeshard.streamer.plan.written.afar import REPLACED_KIND, There
from safeshard.streamer.sources.stores import BucketStore, ConflictError, HubStore, Stored, open_store
from safeshard.streamer.sources.stores.bucket import PART, read_receipt, receipt
from safeshard.streamer.write.journal import Journal, sound_records
from safeshard.streamer.write.staging import make_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

UPLOADED = "uploaded"  # the journal's kind of record of a file that lies afar
AGAIN = "run the same command again once no other run writes there"
Commit = Callable[[], None]


class Destination(Protocol):
    """One place afar. `frees` says that a file which lies there need not stay on this machine."""

    spec: str
    frees: bool

    def recover(self, staging: Path) -> None:
        """Bring what is needed to go on from a run on another machine."""

    def begin(self, journal: Journal | None) -> set[str]:
        """Claim the place; returns the large files that lie there already, from an earlier run.

        `journal` is the one to go on from; None of an output that is finished on this machine.
        """

    def upload(self, name: str, path: Path, commit: Commit) -> None:
        """Bring a finished large file there; `commit` makes the journal durable."""

    def publish(self, files: Mapping[str, Path]) -> None:
        """Bring the rest, the manifest last, and give the output to the world."""

    def forget(self) -> None:
        """Take away what was brought there."""

    def stop(self) -> None:
        """Give up what is under way, for another thread."""


@dataclass(frozen=True)
class Made:
    """What parts of a batch made of an output in a bucket: files that lie there already, in a prefix `beside`.

    `contents` tells the content of each of the output's large files; `whole` are those that one part has written, as
    their names there and sizes.
    """

    beside: BucketStore
    contents: Mapping[str, str]
    whole: Mapping[str, tuple[str, int]]


def destination(job: Job, files: frozenset[str], made: Made | None = None) -> Destination | None:
    """The place afar of a job, if there is one; `files` are the names of its large files."""
    if job.afar is None:
        return None
    store = open_store(job.afar)
    return ToHub(store, job) if isinstance(store, HubStore) else ToBucket(store, files, made)


def receipts_in(journal: bytes) -> Iterator[tuple[str, Stored]]:
    """The large files that the bytes of a journal speak of as brought, and what marked them; the last one counts."""
    for record in sound_records(journal, UPLOADED):
        with contextlib.suppress(KeyError, TypeError):  # forged
            yield read_receipt(record)


class ToBucket:
    """An output in a bucket's prefix."""

    frees = True

    def __init__(self, store: BucketStore, files: frozenset[str], made: Made | None = None) -> None:
        self.spec, self._store, self._large, self._made = store.spec, store, files, made
        self._there = There(store.spec, {})
        self._mark: Stored | None = None  # of the journal as it lies there
        self._receipts: dict[str, Stored] = {}
        self._replaced: set[str] = set()
        self._clear = True  # no finished output lies in the way
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    def recover(self, staging: Path) -> None:
        self._there = There.look(self._store)
        found = self._store.look(JOURNAL_NAME)
        if found is None:
            return
        data, self._mark = found
        path = staging / JOURNAL_NAME
        if not path.exists() and data.startswith(ours.JOURNAL_MAGIC):
            make_folder(staging)
            write_file(path, data)

    def begin(self, journal: Journal | None) -> set[str]:
        assert journal is not None
        names, self._journal = self._there.names, journal
        self._clear = MANIFEST_NAME not in names
        self._replaced = names.keys() - {JOURNAL_NAME, MANIFEST_NAME}
        if self._replaced:  # ours, as the plan has seen: the journal names them until they are gone
            journal.record(REPLACED_KIND, files=sorted(self._replaced))
            journal.commit()
        self._mirror()
        noted = dict(journal.sound(UPLOADED, lambda r: (r["file"], (read_receipt(r)[1], r.get("content")))))
        known = {
            n: stored for n, (stored, content) in noted.items() if n in self._large and content == self._content(n)
        }
        self._receipts = {n: stored for n, stored in known.items() if n in names and names[n].is_as(stored)}
        self._bring()
        return set(self._receipts)

    def _content(self, name: str) -> str | None:
        """What a receipt of this file has to say of its content; nothing where it is made in one piece."""
        return None if self._made is None else self._made.contents[name]

    def _bring(self) -> None:
        """Let the files that one part has written be here."""
        whole = {} if self._made is None else self._made.whole
        if self._made is None or not (left := {n: w for n, w in whole.items() if n not in self._receipts}):
            return
        self._clear_way()
        for name, stored in self._store.bring_all(self._made.beside, left).items():
            self._note(name, stored)
        assert self._journal is not None
        self._journal.commit()
        self._mirror()

    def _note(self, name: str, stored: Stored) -> None:
        assert self._journal is not None
        self._receipts[name] = stored
        content = self._content(name)
        self._journal.record(UPLOADED, file=name, **receipt(stored), **({"content": content} if content else {}))

    def _mirror(self) -> None:
        """Let the journal there be as it is here; raises where another run has claimed the place."""
        assert self._journal is not None
        with self._lock:
            data = self._journal.path.read_bytes()
            data = data[: data.rfind(b"\n") + 1]  # what is being written goes with the next one
            try:
                if self._mark is None:
                    self._mark = self._store.create(JOURNAL_NAME, data)
                else:
                    self._mark = self._store.replace(JOURNAL_NAME, data, self._mark)
            except ConflictError:
                raise ConflictError(f"{self.spec}: another run has begun to write there", AGAIN) from None

    def _clear_way(self) -> None:
        """Take the manifest of an output to be replaced away, before the first of its files is: it is whole no more."""
        with self._lock:
            if not self._clear:
                self._store.delete([MANIFEST_NAME])
                self._clear = True

    def upload(self, name: str, path: Path, commit: Commit) -> None:
        assert self._journal is not None
        self._clear_way()
        self._note(name, self._store.upload(name, path, path.stat().st_size))
        commit()
        self._mirror()

    def publish(self, files: Mapping[str, Path]) -> None:
        self._clear_way()
        rest = {name: path for name, path in files.items() if name not in {*self._receipts, MANIFEST_NAME}}
        large = {name: size for name, path in rest.items() if (size := path.stat().st_size) > PART}
        for name, size in large.items():
            self._receipts[name] = self._store.upload(name, rest[name], size)
        self._receipts |= self._store.put_all({n: path.read_bytes() for n, path in rest.items() if n not in large})
        self._mirror()
        self._check()
        try:
            self._store.create(MANIFEST_NAME, files[MANIFEST_NAME].read_bytes())
        except ConflictError:
            raise ConflictError(f"{self.spec}: another run has finished it meanwhile", "verify it") from None
        self._store.delete([JOURNAL_NAME])

    def _check(self) -> None:
        """Refuse to finish where what lies there is not what was written; what was replaced goes."""
        names = self._store.names()
        wrong = sorted(n for n, stored in self._receipts.items() if n not in names or not names[n].is_as(stored))
        strangers = sorted(names.keys() - self._receipts.keys() - self._replaced - {JOURNAL_NAME})
        if wrong or strangers:
            what = f"is not what was written: {ours.listed(wrong)}" if wrong else f"was added: {ours.listed(strangers)}"
            raise RunError(f"{self.spec} changed underway, {what}", AGAIN)
        self._store.delete(sorted(self._replaced & names.keys() - self._receipts.keys()))

    def forget(self) -> None:
        if self._mark is None or self._journal is None:
            return
        with contextlib.suppress(ConflictError):  # another run's by now
            self._mirror()
            names = self._store.names()
            if self._clear:
                self._store.delete(sorted(names.keys() & {*self._replaced, *self._receipts}))
            self._store.delete([JOURNAL_NAME])

    def stop(self) -> None:
        self._store.stop()


class ToHub:
    """An output in a repository of the Hub."""

    frees = False  # the commit wants the files, should this process end before it

    def __init__(self, store: HubStore, job: Job) -> None:
        self.spec, self._store, self._job = store.spec, store, job
        self._uploaded: dict[str, CommitOperationAdd] = {}

    def recover(self, staging: Path) -> None:
        pass  # what was uploaded is known again by its hash

    def begin(self, journal: Journal | None) -> set[str]:
        self._store.make(self._job.public)
        return set()

    def upload(self, name: str, path: Path, commit: Commit) -> None:
        self._uploaded[name] = self._store.preupload(name, path)

    def publish(self, files: Mapping[str, Path]) -> None:
        additions: dict[str, Any] = {**files, **self._uploaded}
        self._store.commit(additions, MANIFEST_NAME, f"{self._job.title} by safeshard")

    def forget(self) -> None:
        pass  # without a commit nothing shows

    def stop(self) -> None:
        self._store.stop()
