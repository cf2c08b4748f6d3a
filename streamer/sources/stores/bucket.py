"""A prefix in a bucket to write to: s3://, gs:// and az://, through obstore.

Small files are put in one request, on condition where two writers must not meet; large ones go up in parts. A put whose
answer was lost is tried again, finds what it had written itself, and counts as done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from safeshard.manifests.errors import without_secrets
from safeshard.streamer.extras import require
from safeshard.streamer.sources.base import reason
from safeshard.streamer.sources.bucket import open_store
from safeshard.streamer.sources.remote import OPENING, UNDERWAY, BrokenAnswer, Line
from safeshard.streamer.sources.stores.base import ConflictError, Stored, patiently

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 << 20  # bytes of a part of an upload; more where there would be too many
MAX_PARTS = 9_000  # stores take 10,000
PARTS_AT_A_TIME = 8
PART_RETRIES = 6  # of a part by itself, before its file is begun anew
PART_SECONDS = timedelta(seconds=90)
CONDITIONS = {"AlreadyExistsError", "PreconditionError", "FileNotFoundError"}  # of a file that is not as it was seen


class BucketStore:
    """A prefix in a bucket. Credentials, region and endpoint are those of the environment."""

    def __init__(self, url: str) -> None:
        require("obstore", "buckets")
        self.url, self.spec = url, without_secrets(url).rstrip("/")
        self._line = Line()

    @cached_property
    def _store(self) -> ObjectStore:
        return open_store(self.url)

    @cached_property
    def _patient(self) -> ObjectStore:
        """The same, which tries each part of an upload again by itself."""
        return open_store(self.url, {"max_retries": PART_RETRIES, "retry_timeout": PART_SECONDS})

    def names(self, tries: int = OPENING) -> dict[str, Stored]:
        def listed() -> dict[str, Stored]:
            found = (meta for page in self._store.list() for meta in page)
            return {meta["path"]: Stored(meta["size"], meta["e_tag"], meta["version"]) for meta in found}

        return patiently(self._line, self.spec, listed, tries)

    def read(self, name: str) -> bytes | None:
        found = self.look(name)
        return None if found is None else found[0]

    def look(self, name: str, tries: int = OPENING) -> tuple[bytes, Stored] | None:
        """A small file and what marks it; None where it is not there."""
        return patiently(self._line, f"{self.spec}/{name}", partial(self._look, name), tries)

    def _look(self, name: str) -> tuple[bytes, Stored] | None:
        try:
            result = self._store.get(name)
            data = bytes(result.bytes())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None
        return data, Stored(len(data), result.meta["e_tag"], result.meta["version"])

    def look_all(self, names: Sequence[str]) -> dict[str, tuple[bytes, Stored]]:
        """Small files, side by side; those that are there."""
        found = self._line.all(self.spec, [partial(self._looked, name) for name in names])
        return {name: look for name, look in zip(names, found, strict=True) if look is not None}

    def _looked(self, name: str) -> tuple[bytes, Stored] | None:
        return self._line.patiently(f"{self.spec}/{name}", partial(self._look, name), OPENING)

    def put(self, name: str, data: bytes) -> Stored:
        """Write a small file, whatever is there."""
        return self._put(name, data, "overwrite")

    def create(self, name: str, data: bytes) -> Stored:
        """Write a small file where there is none.

        Raises:
            ConflictError: there is one, and it is not this one.
        """
        return self._put(name, data, "create")

    def replace(self, name: str, data: bytes, seen: Stored) -> Stored:
        """Write a small file in place of one that was seen.

        Raises:
            ConflictError: there is another one.
        """
        marks = {key: value for key, value in (("e_tag", seen.e_tag), ("version", seen.version)) if value}
        return self._put(name, data, marks or "overwrite")

    def _put(self, name: str, data: bytes, mode: Any) -> Stored:
        where = f"{self.spec}/{name}"

        def attempt() -> Stored:
            try:
                result = self._store.put(name, data, mode=mode, use_multipart=False)
            except Exception as error:
                if mode == "overwrite" or type(error).__name__ not in CONDITIONS:
                    raise
                found = self._look(name)
                if found is not None and found[0] == data:  # it had come, though its answer had not
                    return found[1]
                problem = f"{where} was written by another run meanwhile"
                raise ConflictError(problem, "let one run at a time write there, then run again") from None
            return Stored(len(data), result["e_tag"], result["version"])

        return patiently(self._line, where, attempt)

    def upload(self, name: str, path: Path, size: int) -> Stored:
        """Write a large file in parts; it is there whole or not at all."""

        def attempt() -> Stored:
            try:
                part = max(PART, -(-size // MAX_PARTS))
                put = self._patient.put
                result = put(name, path, use_multipart=size > part, chunk_size=part, max_concurrency=PARTS_AT_A_TIME)
            except Exception as error:
                if "NoSuchUpload" in str(error):  # completed without an answer, or cleared away: begun anew
                    raise BrokenAnswer(reason(error)) from error
                raise
            return Stored(size, result["e_tag"], result["version"])

        return patiently(self._line, f"{self.spec}/{name}", attempt, UNDERWAY)

    def put_all(self, files: dict[str, bytes]) -> dict[str, Stored]:
        """Write small files side by side."""
        calls = [partial(self._put, name, data, "overwrite") for name, data in files.items()]
        return dict(zip(files, self._line.all(self.spec, calls), strict=True))

    def delete(self, names: Sequence[str]) -> None:
        """Remove files, in order; one that is gone already is removed."""
        for name in names:
            patiently(self._line, f"{self.spec}/{name}", partial(self._gone, name))

    def delete_all(self, names: Sequence[str]) -> None:
        """Remove files side by side, in no order."""
        where = self.spec
        self._line.all(where, [partial(self._line.patiently, where, partial(self._gone, n), UNDERWAY) for n in names])

    def _gone(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # S3 does not tell; Google and Azure do
            self._store.delete(name)

    def bring_all(self, store: BucketStore, named: Mapping[str, tuple[str, int]]) -> dict[str, Stored]:
        """Let files of another prefix of this bucket lie here too; no byte of them goes through this machine.

        `named` are a file's name there and its size, by the name here.
        """
        whole = open_store(urlsplit(self.url)._replace(path="").geturl())
        calls = [partial(self._bring, whole, store, name, *given) for name, given in named.items()]
        return dict(zip(named, self._line.all(self.spec, calls), strict=True))

    def _bring(self, whole: ObjectStore, store: BucketStore, name: str, theirs: str, size: int) -> Stored:
        def attempt() -> Stored:
            whole.copy(f"{store._prefix}/{theirs}", f"{self._prefix}/{name}")
            found = self._store.head(name)
            if found["size"] != size:
                raise BrokenAnswer(f"{found['size']} bytes came, {size} were expected")
            return Stored(size, found["e_tag"], found["version"])

        return patiently(self._line, f"{store.spec}/{theirs}", attempt)

    @property
    def _prefix(self) -> str:
        return urlsplit(self.url).path.strip("/")

    def stop(self) -> None:
        self._line.stop()


def receipt(stored: Stored) -> dict[str, Any]:
    """What a journal notes of an upload."""
    return {"size": stored.size, "e_tag": stored.e_tag, "version": stored.version}


def read_receipt(record: dict[str, Any]) -> tuple[str, Stored]:
    """The file of a journal's record, and what was noted of it.

    Raises:
        TypeError: it is forged.
    """
    name, size, marks = record["file"], record["size"], (record["e_tag"], record["version"])
    if not (isinstance(name, str) and isinstance(size, int) and all(isinstance(mark, str | None) for mark in marks)):
        raise TypeError
    return name, Stored(size, *marks)
