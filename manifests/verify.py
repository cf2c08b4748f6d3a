"""Verification: re-hash an output against its manifest and say what differs.

Every byte of an output is covered: tensors by their hashes, the safetensors headers and the other files by theirs, the
manifest by its own. Names in a manifest are not trusted: what lies outside of the output folder is never opened.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from safeshard.manifests.errors import RequestError, printable
from safeshard.manifests.hashing import hash_tensor_region
from safeshard.manifests.manifest_text import read_manifest
from safeshard.manifests.safetensors_header import HeaderError, TensorRef, header_digest, read_header
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME, FileEntry, Manifest, TensorEntry

Progress = Callable[[int], None]
UNLISTED = frozenset({MANIFEST_NAME, JOURNAL_NAME, "report.html"})  # the journal: of a run killed in its last step


@dataclass(frozen=True)
class Finding:
    """One difference between an output and its manifest; `tensor` is "" where it concerns a whole file."""

    file: str
    tensor: str
    problem: str
    expected: str = ""
    got: str = ""

    def __str__(self) -> str:
        subject = printable(self.file) + (f": {printable(self.tensor)}" if self.tensor else "")
        facts = f": expected {printable(self.expected)}, got {printable(self.got)}" if self.expected or self.got else ""
        return f"{subject}: {printable(self.problem)}{facts}"


class OpenFile(Protocol):
    """A file of an output, to be read in any order. What ends early raises EOFError."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Some bytes."""

    def hash(self, offset: int, nbytes: int, progress: Progress | None) -> str:
        """BLAKE3 of some bytes, in bounded memory; `progress` receives the number of bytes of each piece."""


class Folder(Protocol):
    """Where an output lies."""

    where: str  # the manifest, in messages

    def has_manifest(self) -> bool:
        """Whether there is one, readable or not."""

    def manifest(self) -> bytes:
        """The text of its manifest. Raises RequestError where it cannot be read."""

    def opened(self, name: str) -> AbstractContextManager[OpenFile]:
        """A file of it. Raises OSError where it cannot be opened."""

    def others(self, listed: set[str]) -> Iterator[Finding]:
        """What lies there though it is not listed."""


def verify(output: Path | Folder, *, threads: int = 2, progress: Progress | None = None) -> list[Finding]:
    """Compare the output folder with its manifest; an empty list means that every byte is as written.

    Hashing runs on `threads` threads, and `progress` (called from any of them) receives the bytes done. Findings come
    in the manifest's order. Hidden files, report.html and a journal are not looked at. Raises RequestError without a
    manifest.
    """
    folder: Folder = LocalFolder(output) if isinstance(output, Path) else output
    try:
        text = folder.manifest()
        manifest = Manifest.from_json(text, folder.where)
    except RequestError as error:
        if not folder.has_manifest():
            raise
        return [Finding(MANIFEST_NAME, "", f"not valid: {o.what}", o.expected, o.got) for o in error.offences]
    with ThreadPoolExecutor(threads) as pool:
        findings = [*_check_seal(manifest, text), *_Comparison(folder, manifest, pool, progress).findings()]
    return [*findings, *folder.others({entry.name for entry in manifest.files})]


def _check_seal(manifest: Manifest, text: bytes) -> Iterator[Finding]:
    content = manifest.content_hash()
    if manifest.blake3 != content:
        yield Finding(MANIFEST_NAME, "", "edited after it was written", manifest.blake3 or "a blake3 field", content)
    elif text != manifest.to_json().encode():  # a flipped bit may leave a number or a letter's escape as it was
        yield Finding(MANIFEST_NAME, "", "laid out anew after it was written")


class _Comparison:
    """The files of an output against the manifest's entries."""

    def __init__(self, folder: Folder, manifest: Manifest, pool: ThreadPoolExecutor, progress: Progress | None) -> None:
        self.folder = folder
        self.files = manifest.files
        self.tensors: dict[str, list[TensorEntry]] = defaultdict(list)
        for tensor in manifest.tensors:
            self.tensors[tensor.file].append(tensor)
        self.pool = pool
        self.progress = progress

    def findings(self) -> Iterator[Finding]:
        for entry in self.files:
            try:
                with self.folder.opened(entry.name) as file:
                    if file.size != entry.size:
                        yield _differs(entry.name, "", "size", str(entry.size), str(file.size))
                    check = self._content if entry.header_sha256 is None else self._tensors
                    yield from check(file, entry)
            except HeaderError as error:
                yield Finding(entry.name, error.tensor, "invalid header", error.expected, error.got)
            except FileNotFoundError:
                yield Finding(entry.name, "", "missing")
            except (OSError, EOFError) as error:
                yield Finding(entry.name, "", f"cannot be read: {getattr(error, 'strerror', None) or error}")

    def _content(self, file: OpenFile, entry: FileEntry) -> Iterator[Finding]:
        got = file.hash(0, file.size, self.progress)
        if got != entry.blake3:
            yield _differs(entry.name, "", "content", str(entry.blake3), got)

    def _tensors(self, file: OpenFile, entry: FileEntry) -> Iterator[Finding]:
        header = read_header(entry.name, file.size, file.read)
        got = header_digest(header.raw)
        if got != entry.header_sha256:
            yield _differs(entry.name, "", "header", str(entry.header_sha256), got)
        tensors = self.tensors[entry.name]
        for found in self.pool.map(lambda tensor: self._tensor(file, tensor, header.tensors.get(tensor.name)), tensors):
            yield from found
        for name in sorted(header.tensors.keys() - {tensor.name for tensor in tensors}):
            yield Finding(entry.name, name, "a tensor that the manifest does not name")

    def _tensor(self, file: OpenFile, tensor: TensorEntry, ref: TensorRef | None) -> list[Finding]:
        if ref is None:
            return [Finding(tensor.file, tensor.name, "missing")]
        facts = (
            ("dtype", tensor.dtype, ref.dtype),
            ("shape", str(list(tensor.shape)), str(list(ref.shape))),
            ("hash", tensor.blake3, file.hash(ref.offset, ref.nbytes, self.progress)),
        )
        return [_differs(tensor.file, tensor.name, what, there, here) for what, there, here in facts if there != here]


def _differs(file: str, tensor: str, what: str, expected: str, got: str) -> Finding:
    return Finding(file, tensor, f"{what} differs", expected, got)


@dataclass(frozen=True)
class _LocalFile:
    fd: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self.fd, stop - start, start)

    def hash(self, offset: int, nbytes: int, progress: Progress | None) -> str:
        return hash_tensor_region(self.fd, offset, nbytes, progress)


class LocalFolder:
    """An output in a folder of this machine."""

    def __init__(self, output: Path) -> None:
        self._output, self._file = output, output / MANIFEST_NAME
        self.where = str(self._file)

    def has_manifest(self) -> bool:
        return self._file.is_file()

    def manifest(self) -> bytes:
        return read_manifest(self._file)

    @contextmanager
    def opened(self, name: str) -> Iterator[_LocalFile]:
        """A regular file that lies, links resolved, inside the output folder."""
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in name:
            raise OSError("the name leads outside of the folder")
        try:
            path = (self._output / relative).resolve(strict=True)
        except RuntimeError as error:  # how Python before 3.13 reports a loop of links
            raise OSError("a loop of links") from error
        if not path.is_relative_to(self._output.resolve()):
            raise OSError("the link leads outside of the folder")
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield _LocalFile(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def others(self, listed: set[str]) -> Iterator[Finding]:
        """What a loader could pick up though the manifest does not name it: files in any folder, and links.

        A folder that cannot be looked into is a finding too, for it may hold anything.
        """
        output, unreadable = self._output, list[OSError]()
        for folder, subfolders, names in os.walk(output, onerror=unreadable.append):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
            for name in sorted([*names, *links]):
                relative = (Path(folder) / name).relative_to(output).as_posix()
                if not name.startswith("."):
                    yield from unlisted(relative, listed)
        for error in unreadable:
            relative = Path(error.filename).relative_to(output).as_posix()
            yield Finding(relative, "", f"cannot be listed: {error.strerror}")


def unlisted(name: str, listed: set[str]) -> Iterator[Finding]:
    """The finding of a file that is neither listed in the manifest nor one that every output may have."""
    if name not in listed | UNLISTED:
        yield Finding(name, "", "a file that the manifest does not name")
