"""Where a checkpoint or adapter lies: a folder, a Hub repository, or an fsspec URL.

A source lists its files once, reads byte ranges of them, and fetches nothing that is not asked for. Names come from
index files and are hostile: only listed files can be read, and a local file must lie inside its folder.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from safeshard.manifests.errors import Offence, RequestError, RunError

_HUB_NAME = re.compile(
    r"(?:hf://)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[\w-][\w./-]*))?", re.ASCII
)
_CONFIGS = ("config.json", "adapter_config.json")
MAX_JSON_DEPTH = 64
MAX_JSON_BYTES = 200_000_000  # the index of a checkpoint with a million tensors is about 100 MB
RANGE_BYTES = 1 << 25  # of one remote read: a tensor is not held twice


class Source(Protocol):
    """A read-only folder of files. `spec` is what the user wrote, `identity` is equal for equal places.

    What fails after the source was opened raises `RunError`; a name that is not listed raises `RequestError`.
    """

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

    def changed(self) -> set[str]:
        """The files that are no longer what they were when the source was opened, as far as can be told."""


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Resolve a folder, `hf://org/name@revision` (or `org/name`), or an fsspec URL.

    Raises:
        RequestError: nothing of the kind is there, or it cannot be listed.
    """
    text = os.fspath(spec)
    try:
        path = Path(text.removeprefix("file://"))
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long, not permitted, a null byte
        raise _refuse(text, "a folder, hf://org/name or a URL", _reason(error), "correct the path") from error
    if text and is_folder:
        return LocalSource(path, text)
    if text.startswith("hf://") or (not exists and _HUB_NAME.fullmatch(text)):
        return _open_hub(text)
    if is_url(text):
        return UrlSource(text)
    got = "a file" if exists and text else "no such folder"
    raise _refuse(text, "a folder, hf://org/name or a URL", got, "name the folder that holds the safetensors files")


def is_url(spec: str) -> bool:
    """Whether a place that is no local folder is opened by fsspec."""
    return "://" in spec and not spec.startswith(("file://", "hf://"))


def pinned(spec: str, revision: str | None) -> str:
    """What to write for a Hub repository at a commit; other places stay as they are."""
    match = _HUB_NAME.fullmatch(spec) if revision is not None else None
    return f"hf://{match['repo']}@{revision}" if match else spec


def read_json(source: Source, name: str) -> Any:
    """Parse a small JSON file of a source.

    Raises:
        RequestError: it is too large, not JSON, nested too deep to write it again, or names a key twice.
    """
    size = source.sizes()[name]
    if size > MAX_JSON_BYTES:
        raise _refuse(f"{source.spec}/{name}", f"at most {MAX_JSON_BYTES} bytes", f"{size} bytes", "check the file")
    try:
        value = json.loads(source.read(name, 0, size), object_pairs_hook=_unique)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # escapes can smuggle in lone surrogates
        return value
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{source.spec}/{name}", "valid JSON", _reason(error), "check the file") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):  # parsers differ in which of the two they take
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return table


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        children = (child for v in level for child in (v.values() if isinstance(v, dict) else v))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")


class LocalSource:
    """A local folder, read with positional reads so that a truncated file is an error and not a signal."""

    def __init__(self, folder: Path, spec: str, revision: str | None = None) -> None:
        self.folder, self.spec, self.revision = folder.resolve(), spec, revision
        self.identity = str(self.folder)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            self._stamps = {p.name: _stamp(p) for p in sorted(self.folder.iterdir()) if p.is_file()}
        except OSError as error:
            raise _refuse(spec, "a folder that can be listed", _reason(error), "check its permissions") from error
        self._sizes = {name: stamp[0] for name, stamp in self._stamps.items()}

    def changed(self) -> set[str]:
        return {name for name, stamp in self._stamps.items() if _stamp(self.folder / name) != stamp}

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def local_path(self, name: str) -> Path:
        where, path = f"{self.spec}/{name}", (self.folder / name).resolve()
        if name not in self._sizes or not any(path.is_relative_to(folder) for folder in self._allowed()):
            raise _refuse(where, "a file inside the folder", str(path), "copy the file into the folder")
        if not path.is_file():  # a pipe in its place would block
            raise RunError(f"{where} is gone", "restore the file, then run again")
        return path

    def _allowed(self) -> list[Path]:
        """The folder itself; in the Hub's cache, where snapshots/<commit>/<file> are links, also both of its stores."""
        if self.folder.parent.name != "snapshots":
            return [self.folder]
        repo = self.folder.parent.parent
        return [self.folder, repo / "blobs", repo.parent / "blobs"]

    def read(self, name: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.readinto(name, start, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        where, position = f"{self.spec}/{name}", 0
        try:
            file = self._open(name)
            while position < len(view):
                count = os.preadv(file, [view[position:]], offset + position)
                if count == 0:
                    raise _short(where, offset + position, offset + len(view))
                position += count
        except OSError as error:
            raise RunError(f"{where}: reading failed: {_reason(error)}", "check the file, then run again") from error

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self.local_path(name), os.O_RDONLY | os.O_CLOEXEC)
            return self._files[name]

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class HubSource:
    """A repository of the Hugging Face Hub, pinned to the commit that its revision names at the start.

    Headers are read by ranged requests; every other file is downloaded to the Hub's cache when first read.

    Raises:
        Exception: whatever huggingface_hub raises for a repository that is missing, gated or out of reach.
    """

    def __init__(self, spec: str, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        self.spec, self.repo = spec, repo
        self.revision: str | None = str(info.sha)
        self.identity = f"hf://{repo}@{self.revision}"
        self._sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or [] if "/" not in s.rfilename}
        self._fetched: dict[str, LocalSource] = {}
        self._locks = {name: threading.Lock() for name in self._sizes}
        for name in self._sizes.keys() & _CONFIGS:  # shows a gated repository, and notes the branch for offline use
            hf_hub_download(repo, name, revision=revision)

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import try_to_load_from_cache

        _require(self, name)
        cached = isinstance(try_to_load_from_cache(self.repo, name, revision=self.revision), str)
        if name.endswith(".safetensors") and not cached:
            return self._request(name, start, stop)
        return self._fetch(name).read(name, start, stop)

    def _request(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

        if start == stop:  # no range says this
            return b""
        where, url = f"{self.spec}/{name}", hf_hub_url(self.repo, name, revision=self.revision)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
        except Exception as error:  # the network layer's errors have no common base
            raise RunError(f"{where}: {_reason(error)}", "check the network, then run again") from error
        if len(response.content) != stop - start:
            raise _short(where, start + len(response.content), stop)
        return bytes(response.content)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        self._fetch(name).readinto(name, offset, view)

    def local_path(self, name: str) -> Path:
        return self._fetch(name).local_path(name)

    def changed(self) -> set[str]:
        return set()  # a commit's files do not change

    def _fetch(self, name: str) -> LocalSource:
        from huggingface_hub import hf_hub_download

        _require(self, name)
        with self._locks[name]:  # one download a file, however many readers wait for it
            if name not in self._fetched:
                try:
                    path = Path(hf_hub_download(self.repo, name, revision=self.revision))
                except Exception as error:  # the network layer's errors have no common base
                    message = f"{self.spec}/{name}: the download failed: {_reason(error)}"
                    raise RunError(message, "check the network, then run again") from error
                self._fetched[name] = LocalSource(path.parent, self.spec, self.revision)
            return self._fetched[name]


def _open_hub(spec: str) -> Source:
    from huggingface_hub import constants, snapshot_download

    match = _HUB_NAME.fullmatch(spec)
    if match is None:
        raise _refuse(spec, "hf://org/name or hf://org/name@revision", "another form", "correct the name")
    repo, revision = match["repo"], match["revision"]
    place, remedy = "on the Hub", "check the name, the revision, HF_TOKEN and the network"
    try:
        if not constants.HF_HUB_OFFLINE:
            return HubSource(spec, repo, revision)
        place, remedy = "in the Hub's cache (HF_HUB_OFFLINE is set)", "download it, or name a folder"
        # Nothing is asked for, so an incomplete snapshot will do: what a job lacks is refused by name later.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception as error:  # the network layer's errors have no common base
        raise _refuse(spec, f"a folder, or a repository {place}", _reason(error), remedy) from error
    return LocalSource(folder, spec, folder.name)


class UrlSource:
    """Any folder that fsspec can list and read by ranges: s3://, gs://, memory://, ..."""

    revision: str | None = None

    def __init__(self, spec: str) -> None:
        import fsspec

        self.spec = self.identity = spec.rstrip("/")
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self.spec)
            entries = self._fs.ls(self._path, detail=True)
            self._sizes = {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        except ImportError as error:
            remedy = "pip install 'safeshard[hub-s3]', or the driver that is named"
            raise _refuse(spec, "an installed fsspec driver", _reason(error), remedy) from error
        except Exception as error:  # drivers raise what they like
            raise _refuse(spec, "a folder that fsspec can list", _reason(error), "correct the URL") from error

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, name: str, start: int, stop: int) -> bytes:
        _require(self, name)
        where = f"{self.spec}/{name}"
        if start == stop:  # no range says this
            return b""
        try:
            data = bytes(self._fs.cat_file(f"{self._path}/{name}", start=start, end=stop))
        except Exception as error:  # drivers raise what they like
            raise RunError(f"{where}: {_reason(error)}", "check the connection, then run again") from error
        if len(data) != stop - start:
            raise _short(where, start + len(data), stop)
        return data

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        for begin in range(0, len(view), RANGE_BYTES):
            part = view[begin : begin + RANGE_BYTES]
            part[:] = self.read(name, offset + begin, offset + begin + len(part))

    def local_path(self, name: str) -> None:
        return None

    def changed(self) -> set[str]:
        return set()  # each range is a request of its own; only sizes were listed


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size, time of change and inode; (-1, -1, -1) where the file is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (-1, -1, -1)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _refuse(where: str, expected: str, got: str, remedy: str) -> RequestError:
    return RequestError(Offence(where, "", expected, got, remedy))


def _require(source: Source, name: str) -> None:
    if name not in source.sizes():
        raise _refuse(f"{source.spec}/{name}", "a file that is listed there", "no such file", "check the index")


def _short(where: str, end: int, expected: int) -> RunError:
    problem = f"{where} has nothing at byte {end} of {expected} expected: it is truncated, or changed while it was read"
    return RunError(problem, "restore the file, then run again")


def _reason(error: Exception) -> str:
    words = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
