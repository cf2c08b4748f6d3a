"""Finished outputs that lie in a bucket or on the Hub, read as local ones are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blake3 import blake3

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.manifest_text import MAX_MANIFEST_BYTES
from safeshard.manifests.schema import MANIFEST_NAME, Manifest
from safeshard.manifests.verify import Finding, Progress, unlisted
from safeshard.streamer.sources import Source, open_source
from safeshard.streamer.sources.bucket import SCHEMES
from safeshard.streamer.sources.stores import BucketStore

WINDOW = 32 << 20  # bytes that one thread asks for at a time, in ranges side by side
THREADS = 4


@dataclass(frozen=True)
class _File:
    source: Source
    name: str
    size: int

    def read(self, start: int, stop: int) -> bytes:
        return self.source.read(self.name, start, stop)

    def hash(self, offset: int, nbytes: int, progress: Progress | None) -> str:
        hasher = blake3()
        buffer = memoryview(bytearray(min(WINDOW, nbytes)))
        for begin in range(offset, offset + nbytes, WINDOW):
            view = buffer[: offset + nbytes - begin]
            self.source.readinto(self.name, begin, view)
            hasher.update(view)
            if progress is not None:
                progress(len(view))
        return hasher.hexdigest()


class Afar:
    """An output behind a URL. Its files are streamed, and never kept whole."""

    def __init__(self, url: str) -> None:
        """List it.

        Raises:
            RequestError: it cannot be listed, or nothing is there.
        """
        self.url = url.rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
        self._source = open_source(self.url)
        self._sizes = self._source.sizes()
        self.spec = self._source.spec
        self.where = f"{self.spec}/{MANIFEST_NAME}"
        self.nbytes = sum(self._sizes.values())

    def has_manifest(self) -> bool:
        return MANIFEST_NAME in self._sizes

    def manifest(self) -> bytes:
        size = self._sizes.get(MANIFEST_NAME, 0)
        expected, remedy = "a manifest", "name an output of safeshard; one without a manifest is not finished"
        if not self.has_manifest():
            raise RequestError(Offence(self.where, "", expected, "none there", remedy))
        if size > MAX_MANIFEST_BYTES:
            raise RequestError(Offence(self.where, "", f"at most {MAX_MANIFEST_BYTES} bytes", str(size)))
        try:
            return self._source.read(MANIFEST_NAME, 0, size)
        except RunError as error:
            raise RequestError(Offence(error.message, remedy=error.remedy)) from error

    def load(self) -> Manifest:
        """The manifest, parsed."""
        return Manifest.from_json(self.manifest(), self.where)

    @contextmanager
    def opened(self, name: str) -> Iterator[_File]:
        if name not in self._sizes:
            raise FileNotFoundError(name)
        yield _File(self._source, name, self._sizes[name])

    def others(self, listed: set[str]) -> Iterator[Finding]:
        """In a bucket all below the prefix; of a repository the files beside the manifest."""
        in_bucket = self.url.partition("://")[0].lower() in SCHEMES
        names = BucketStore(self.url).names() if in_bucket else self._sizes
        for name in sorted(names):
            if not name.startswith("."):
                yield from unlisted(name, listed)
