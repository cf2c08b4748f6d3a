"""A folder behind a URL as a source: what every such source does, and the one that fsspec opens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from safeshard.manifests.errors import RunError, without_secrets
from safeshard.streamer.sources.base import Checked, Transfer, reason, refuse, require
from safeshard.streamer.sources.http import PIECE
from safeshard.streamer.sources.remote import OPENING, UNDERWAY, BrokenAnswer, Final, Line, Stopped, fault_of


@dataclass(frozen=True)
class Listed:
    """A file as a listing has it. `mark` changes when the file does: an ETag, a version, a time."""

    size: int
    mark: str | None = None


class RemoteFolder:
    """A listed folder that is read by ranges; subclasses list it and fetch a piece.

    `spec` and `identity` hold no userinfo and no query: they are written and shown.
    """

    revision: str | None = None
    far = True

    def __init__(self, url: str) -> None:
        """List the folder.

        Raises:
            RequestError: it cannot be listed.
        """
        self.url = url
        self.spec = self.identity = without_secrets(url).rstrip("/")
        if self.spec != url.rstrip("/"):  # another query may be another place
            self.identity += f"#{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self._line = Line()
        try:
            self._files = self._line.call(self.spec, self._list, OPENING)
        except (RunError, ImportError) as error:
            cause = error.__cause__ or error
            remedy = error.remedy if isinstance(error, RunError) else fault_of(cause).remedy
            raise refuse(self.spec, self.expected, reason(cause).removeprefix(f"{self.spec}: "), remedy) from cause

    expected = "a folder that can be listed"

    def _list(self) -> Mapping[str, Listed]:
        raise NotImplementedError

    def _fetch(self, name: str, start: int, view: memoryview) -> int:
        """Fill `view` from `start` on as far as it goes; returns how far."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self._files.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        buffer = bytearray(max(stop - start, 0))
        self._fill(name, start, memoryview(buffer), OPENING)
        return bytes(buffer)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        self._fill(name, offset, view, UNDERWAY)

    def _fill(self, name: str, offset: int, view: memoryview, tries: int) -> None:
        require(self, name)
        pieces = [(offset + begin, view[begin : begin + PIECE]) for begin in range(0, len(view), PIECE)]
        self._line.all(f"{self.spec}/{name}", [partial(self._piece, name, tries, *piece) for piece in pieces])

    def _piece(self, name: str, tries: int, start: int, view: memoryview) -> None:
        where, position = f"{self.spec}/{name}", 0

        def attempt() -> None:
            nonlocal position
            if self._line.stopped.is_set():
                raise Stopped(where)
            position += self._fetch(name, start + position, view[position:])
            if position < len(view):
                raise BrokenAnswer(f"nothing came of byte {start + position}, {start + len(view)} were expected")

        self._line.patiently(where, attempt, tries, lambda: position)

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        pass

    def local_path(self, name: str) -> None:
        return None

    def changed(self) -> set[str]:
        """Files whose size or mark has changed since the source was opened."""
        now = self._line.call(self.spec, self._list, UNDERWAY)
        return {name for name, file in self._files.items() if now.get(name) != file}

    def checked(self, name: str) -> Checked | None:
        return "ranges" if name in self._files and self._files[name].mark else None

    def transfer(self, name: str) -> Transfer:
        return "ranges"

    def keeps(self, name: str) -> bool:
        return False

    def stop(self) -> None:
        self._line.stop()


class UrlSource(RemoteFolder):
    """Any folder that fsspec can list and read by ranges: memory://, sftp://, ..., and buckets without obstore."""

    expected = "a folder that fsspec can list"

    def _list(self) -> Mapping[str, Listed]:
        fs, path = self._open()
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True)
        return {
            entry["name"].rsplit("/", 1)[-1]: Listed(int(entry["size"]), _mark(entry))
            for entry in entries
            if entry["type"] == "file"
        }

    def _fetch(self, name: str, start: int, view: memoryview) -> int:
        fs, path = self._open()
        data = fs.cat_file(f"{path}/{name}", start=start, end=start + len(view))
        if len(data) > len(view):
            raise Final(f"{self.spec}/{name}: more bytes came than were asked for", "use another driver or server")
        view[: len(data)] = data
        return len(data)

    def _open(self) -> tuple[Any, str]:
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.url.rstrip("/"))
        except ImportError as error:
            remedy = "pip install 'safeshard[buckets]' for s3://, gs:// and az://, or the driver that is named"
            raise refuse(self.spec, "an installed fsspec driver", reason(error), remedy) from error
        return fs, path


def _mark(entry: Mapping[str, Any]) -> str | None:
    """What tells one content of a file from another, in the words of whatever driver."""
    keys = ("ETag", "etag", "e_tag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
    found = next((entry[key] for key in (*keys, "modified", "updated", "created") if entry.get(key) is not None), None)
    return None if found is None else str(found)
