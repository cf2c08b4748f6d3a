"""Where a checkpoint or adapter lies: a folder, a Hub repository, or an fsspec URL.

A source lists files, reads byte ranges of them, and fetches nothing that is not asked for. Names come from index files
and are hostile: only files directly listed by the source can be read, and a local file must lie inside its folder.
"""

from __future__ import annotations

import json
import os
import re
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safeshard.manifests.errors import Offence, RequestError, RunError

_HUB_NAME = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
MAX_JSON_BYTES = 200_000_000  # the index of a checkpoint with a million tensors is about 100 MB


class Source(Protocol):
    """A read-only folder of files. `spec` is what the user wrote, `identity` is equal for equal places."""

    spec: str
    identity: str
    revision: str | None

    def sizes(self) -> dict[str, int]:
        """Names and sizes (bytes) of the files, without their contents. Subfolders are left out."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file: for headers and small files."""

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on. May fetch the file first. Safe to call from several threads."""

    def local_path(self, name: str) -> Path | None:
        """A local path that holds the whole file, fetched first if need be; None where only ranges can be read."""


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Resolve a folder, `hf://org/name@revision` (or `org/name`), or an fsspec URL.

    Raises:
        RequestError: nothing of the kind is there.
    """
    text = os.fspath(spec)
    if "\0" in text:
        raise _refuse(text, "a path", "a name with a null byte", "correct the path")
    if Path(text).is_dir():
        return LocalSource(text)
    if text.startswith("hf://") or ("://" not in text and _HUB_NAME.fullmatch(text) and not Path(text).exists()):
        return _open_hub(text)
    if "://" in text:
        return UrlSource(text)
    kind = "a file" if Path(text).exists() else "no such folder"
    raise _refuse(text, "a folder, hf://org/name or a URL", kind, "name the folder that holds the safetensors files")


def read_json(source: Source, name: str) -> Any:
    """Parse a small JSON file of a source.

    Raises:
        RequestError: it is too large, or not JSON.
    """
    size = source.sizes()[name]
    if size > MAX_JSON_BYTES:
        raise _refuse(f"{source.spec}/{name}", f"at most {MAX_JSON_BYTES} bytes", f"{size} bytes", "check the file")
    try:
        return json.loads(source.read(name, 0, size))
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{source.spec}/{name}", "valid JSON", str(error)[:200], "check the file") from None


def _refuse(where: str, expected: str, got: str, remedy: str) -> RequestError:
    return RequestError([Offence(where, "", expected, got, remedy)])


class LocalSource:
    """A local folder, read with positional reads so that a truncated file is an error and not a signal."""

    revision: str | None = None

    def __init__(self, spec: str, revision: str | None = None) -> None:
        self.spec, self.revision = spec, revision
        self.folder = Path(spec).resolve()
        self.identity = str(self.folder)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def sizes(self) -> dict[str, int]:
        return {p.name: p.stat().st_size for p in sorted(self.folder.iterdir()) if p.is_file()}

    def local_path(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        allowed = [self.folder]
        if self.folder.parent.name == "snapshots":  # the Hub's cache: snapshots/<commit>/<file> links into blobs/
            allowed.append(self.folder.parent.parent / "blobs")
        if Path(name).name != name or not any(path.is_relative_to(folder) for folder in allowed):
            raise _refuse(f"{self.spec}/{name}", "a file inside the folder", str(path), "copy the file into the folder")
        return path

    def read(self, name: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.readinto(name, start, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        position = 0
        try:
            file = self._open(name)
            while position < len(view):
                count = os.preadv(file, [view[position:]], offset + position)
                if count == 0:
                    raise RunError(
                        f"{self.spec}/{name} ends at byte {offset + position}, {offset + len(view)} were expected: "
                        "it is truncated, or changed while it was read",
                        "restore the file and run the same command again",
                    )
                position += count
        except OSError as error:
            raise RunError(
                f"{self.spec}/{name}: reading failed: {error.strerror}", "check the disk, then run again"
            ) from error

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self.local_path(name), os.O_RDONLY | os.O_CLOEXEC)
            return self._files[name]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


class HubSource:
    """A repository of the Hugging Face Hub at one commit: headers by ranged requests, shards when first needed."""

    def __init__(self, spec: str, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        self.spec, self.repo = spec, repo
        self.revision: str | None = str(info.sha)
        self.identity = f"hf://{repo}@{self.revision}"
        self._sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or [] if "/" not in s.rfilename}
        self._remote = HfFileSystem()
        self._shards: dict[str, LocalSource] = {}
        self._locks = {name: threading.Lock() for name in self._sizes}

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, name, revision=self.revision)
        if isinstance(cached, str):
            return LocalSource(str(Path(cached).parent)).read(name, start, stop)
        try:
            return bytes(self._remote.cat_file(f"{self.repo}@{self.revision}/{name}", start=start, end=stop))
        except Exception as error:  # whatever the network layer raises
            raise RunError(
                f"{self.spec}/{name}: reading from the Hub failed: {error}", "check the network, then run again"
            ) from error

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        self._shard(name).readinto(name, offset, view)

    def local_path(self, name: str) -> Path:
        return self._shard(name).local_path(name)

    def _shard(self, name: str) -> LocalSource:
        from huggingface_hub import hf_hub_download

        if name not in self._sizes:
            raise _refuse(f"{self.spec}/{name}", "a file of the repository", "no such file", "check the index")
        with self._locks[name]:  # one download a shard, however many readers wait for it
            if name not in self._shards:
                try:
                    path = hf_hub_download(self.repo, name, revision=self.revision)
                except Exception as error:  # whatever the network layer raises
                    raise RunError(
                        f"{self.spec}/{name}: download failed: {error}", "check the network, then run again"
                    ) from error
                self._shards[name] = LocalSource(str(Path(path).parent), self.revision)
            return self._shards[name]


def _open_hub(spec: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    match = _HUB_NAME.fullmatch(spec)
    if match is None:
        raise _refuse(spec, "hf://org/name or hf://org/name@revision", "another form", "correct the name")
    repo, revision = match["repo"], match["revision"]
    try:
        if not HF_HUB_OFFLINE:
            return HubSource(spec, repo, revision)
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception as error:  # the hub's errors have no common base
        where = "in the local cache (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else "on the Hub"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "check the name, the revision and the token, or give a local folder"
        raise _refuse(spec, f"a folder, or a repository {where}", reason, remedy) from error
    source = LocalSource(str(folder), folder.name)
    source.spec = spec
    return source


class UrlSource:
    """Any folder that fsspec can list and read by ranges: s3://, gs://, memory://, ..."""

    revision: str | None = None

    def __init__(self, spec: str) -> None:
        import fsspec

        self.spec = self.identity = spec.rstrip("/")
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self.spec)
        except ImportError as error:
            raise _refuse(spec, "an installed fsspec driver", str(error), "pip install 'safeshard[hub-s3]'") from error
        except ValueError as error:
            raise _refuse(spec, "a URL that fsspec knows", str(error), "correct the URL") from error
        if not self._sizes:
            raise _refuse(spec, "a folder with files", "nothing there", "correct the URL")

    @cached_property
    def _sizes(self) -> dict[str, int]:
        try:
            entries = self._fs.ls(self._path, detail=True)
        except (OSError, ValueError) as error:
            raise _refuse(self.spec, "a readable folder", str(error) or type(error).__name__, "check it") from error
        return {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, name: str, start: int, stop: int) -> bytes:
        if name not in self._sizes:
            raise _refuse(f"{self.spec}/{name}", "a file of the folder", "no such file", "check the index")
        try:
            data = bytes(self._fs.cat_file(f"{self._path}/{name}", start=start, end=stop))
        except OSError as error:
            raise RunError(
                f"{self.spec}/{name}: reading failed: {error}", "check the connection, then run again"
            ) from error
        if len(data) != stop - start:
            raise RunError(
                f"{self.spec}/{name}: {len(data)} bytes instead of {stop - start}", "check the file, then run again"
            )
        return data

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        view[:] = self.read(name, offset, offset + len(view))

    def local_path(self, name: str) -> None:
        return None
