"""Writing an output so that it is there whole or not at all.

Everything is written in `OUT.partial`, beside OUT: safetensors files under a `.part` name, header first, each tensor
at its own offset in any order. When all are complete they are synced and renamed, the small files and the manifest
follow, and one rename of the folder publishes the output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.hashing import hash_tensor_region
from safeshard.manifests.journal import Journal, sync_path
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import MANIFEST_NAME
from safeshard.streamer.plan import Copy, OutputFile, staging_of
from safeshard.streamer.stream import TORCH_DTYPES, Read

JOURNAL = "journal.jsonl"
COMMIT_SECONDS = 5.0  # of work that a power cut may undo
CHUNK_BYTES = 1 << 22
PIECE = 1 << 18  # elements written at a time: they pass the check, the hash and the disk in a core's cache
_EXPONENTS = {  # the integer type of a dtype's size, and the bits that are all set in NaN and infinity alone
    torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}  # fmt: skip


class NotFiniteError(RunError):
    """A new tensor holds NaN, infinity, or a value too large for its dtype."""


class Writer:
    """One job's output under way. Thread-safe.

    Attributes:
        hashes: output tensor -> BLAKE3 of its bytes, for all tensors written so far.
        bytes_written: by this process.
    """

    def __init__(self, output: Path, files: list[OutputFile], fingerprint: dict[str, Any], overwrite: bool) -> None:
        self.output = output.absolute()
        self.staging = staging_of(self.output)
        self.files, self.bytes_written = files, 0
        self.hashes: dict[str, str] = {}
        self._places = {name: (file.name, ref) for file in files for name, ref in file.tensors.items()}
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()
        self._committed = time.monotonic()
        with clear_errors(self.staging):
            _check_ours(self.staging)
            if overwrite and self.staging.exists():
                _discard(self.staging)
            self.staging.mkdir(parents=True, exist_ok=True)
        self.journal = Journal.open(self.staging / JOURNAL, fingerprint)
        try:
            self.hashes = {record["name"]: record["blake3"] for record in self.journal.entries("tensor")}
            with clear_errors(self.staging):
                for file in files:
                    self._open(file)
        except BaseException:
            self.close_files()
            self.journal.close()
            raise

    def _open(self, file: OutputFile) -> None:
        part = self.staging / (file.name + ".part")
        if (self.staging / file.name).exists():  # completed before an interruption
            part = self.staging / file.name
        fd = self._fds[file.name] = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if (size := os.fstat(fd).st_size) != file.nbytes:
            if not self.hashes.keys().isdisjoint(file.tensors):
                expected = f"{file.nbytes} bytes, some of them finished"
                raise RequestError(Offence(str(part), "", expected, f"{size} bytes", "--overwrite starts anew"))
            _allocate(fd, file.nbytes)
        _write_all(fd, memoryview(file.header), 0)
        self.bytes_written += len(file.header)

    def place(self, name: str) -> TensorRef:
        """Where an output tensor goes: its dtype, shape, offset."""
        return self._places[name][1]

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Write a tensor, or pieces of it in row-major order (any device, any float dtype), cast to the planned dtype.

        Raises:
            NotFiniteError: it holds NaN or infinity, or a value that the planned dtype cannot hold.
            RunError: the disk is full, or writing failed.
        """
        if isinstance(tensor, Tensor):
            assert tuple(tensor.shape) == self.place(name).shape, f"{name}: shape {tuple(tensor.shape)}"
            if tensor.is_cuda:  # in one copy
                tensor = tensor.to(TORCH_DTYPES[self.place(name).dtype]).cpu()
            tensor = torch.split(tensor.reshape(-1), PIECE)
        under_way = self.begin(name)
        for piece in tensor:
            under_way.add(piece)
        under_way.finish()

    def begin(self, name: str) -> TensorWrite:
        """Begin to write a tensor piece by piece; it counts once it is finished."""
        return TensorWrite(self, name)

    def copy(self, copy: Copy) -> None:
        """Take over a tensor's bytes, through the kernel where the input is a local file."""
        file, ref = self._places[copy.name]
        fd = self._fds[file]
        path = copy.source.local_path(copy.ref.file)
        with clear_errors(self.output):
            if path is None or not _copy_range(path, fd, copy.ref.offset, ref):
                buffer = bytearray(min(CHUNK_BYTES, ref.nbytes))
                for begin in range(0, ref.nbytes, CHUNK_BYTES):
                    view = memoryview(buffer)[: min(CHUNK_BYTES, ref.nbytes - begin)]
                    copy.source.readinto(copy.ref.file, copy.ref.offset + begin, view)
                    _write_all(fd, view, ref.offset + begin)
            digest = hash_tensor_region(fd, ref.offset, ref.nbytes)
        self._finished(copy.name, digest, ref.nbytes)

    def record(self, kind: str, **payload: Any) -> None:
        """Note something in the journal; durable with the next commit."""
        self.journal.record(kind, **payload)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make all that was written and noted so far durable."""
        self._committed = time.monotonic()
        with clear_errors(self.output):
            self.journal.commit(sync=self._sync)

    def complete(self) -> None:
        """Sync the safetensors files and give them their names. All tensors must be written."""
        missing = self._places.keys() - self.hashes.keys()
        assert not missing, f"tensors not written: {sorted(missing)[:3]}"
        self.commit()
        with clear_errors(self.output):
            self._sync()
            for file in self.files:
                part = self.staging / (file.name + ".part")
                if part.exists():
                    part.rename(self.staging / file.name)
        self.close_files()

    def add_file(self, name: str, data: bytes) -> None:
        """Write one small file, synced."""
        with clear_errors(self.output), (self.staging / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.bytes_written += len(data)

    def publish(self, overwrite: bool) -> None:
        """Give the finished folder its name. The manifest must be in place."""
        known = {file.name for file in self.files}
        with clear_errors(self.output):
            (self.staging / JOURNAL).unlink()
            sync_path(self.staging)
            old = None
            if overwrite and self.output.exists():
                old = self.output.with_name(f"{self.output.name}.replaced-{os.getpid()}")
                self.output.rename(old)
            self.staging.rename(self.output)
            sync_path(self.output.parent)
            if old is not None:
                shutil.rmtree(old)
        self.journal.close()
        assert known <= {p.name for p in self.output.iterdir()}

    def abandon(self) -> None:
        """Release everything; what was finished stays for a resume, and where nothing was, no trace is left."""
        try:
            if self.hashes and self.staging.exists():
                self.commit()
        finally:
            self.close_files()
            if not self.hashes and self.staging.exists():
                shutil.rmtree(self.staging)
            self.journal.close()

    def close_files(self) -> None:
        """Release the safetensors files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _sync(self) -> None:
        for fd in self._fds.values():
            os.fsync(fd)

    def _finished(self, name: str, digest: str, nbytes: int) -> None:
        with self._lock:
            self.hashes[name] = digest
            self.bytes_written += nbytes
        self.record("tensor", name=name, blake3=digest)


class TensorWrite:
    """One output tensor on its way to the disk: each piece is checked, hashed and written while it is in cache."""

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer, self._name = writer, name
        file, self._ref = writer._places[name]
        self._fd, self._offset, self._hash = writer._fds[file], self._ref.offset, blake3()

    def add(self, piece: Tensor) -> None:
        """Write what follows in row-major order; raises as `Writer.write` does."""
        output = self._writer.output
        host = piece.to("cpu", TORCH_DTYPES[self._ref.dtype]).contiguous()
        if not all_finite(host):
            problem = "is not finite" if not bool(torch.isfinite(piece).all()) else f"does not fit {self._ref.dtype}"
            remedy = "check the inputs, or choose another --dtype"
            raise NotFiniteError(f"{output}: the new {self._name} {problem}", remedy)
        data = host.reshape(-1).view(torch.uint8).numpy().data
        with clear_errors(output):
            _write_all(self._fd, data, self._offset)
        self._hash.update(data)
        self._offset += len(data)

    def finish(self) -> None:
        """Note the tensor as written. All its pieces must be."""
        assert self._offset == self._ref.offset + self._ref.nbytes, f"{self._name}: pieces of another size"
        self._writer._finished(self._name, self._hash.hexdigest(), self._ref.nbytes)


def all_finite(tensor: Tensor) -> bool:
    """Whether a contiguous host tensor holds neither NaN nor infinity, by its exponent bits.

    In bounded memory; torch.isfinite makes a mask of the whole tensor, and is slow on half precision.
    """
    if tensor.dtype not in _EXPONENTS:
        return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    integer, mask = _EXPONENTS[tensor.dtype]
    parts = torch.split(tensor.reshape(-1).view(integer), 1 << 20)
    return all(int(part.bitwise_and(mask).max()) != mask for part in parts if part.numel())


def refuse_not_finite(tensors: Iterable[tuple[Read, Tensor]]) -> None:
    """Name the input tensor that holds NaN or infinity, if one does.

    Raises:
        RunError: one does.
    """
    for read, tensor in tensors:
        if not all_finite(tensor):
            where = f"{read.source.spec}/{read.ref.file}: {read.ref.name}"
            raise RunError(f"{where} holds NaN or infinity", "mend the checkpoint, then run again")


@contextlib.contextmanager
def clear_errors(place: Path) -> Iterator[None]:
    """Turn an OSError about `place` into a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{place}: the disk is full", "free some space and run the same command again") from error
        raise RunError(f"{place}: {error.strerror or error}", "mend it and run the same command again") from error


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)  # a disk too small shows now, not hours later
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    os.ftruncate(fd, size)


def _copy_range(path: Path, target: int, offset: int, ref: TensorRef) -> bool:
    """Copy inside the kernel; False where the file system cannot."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < ref.nbytes:
            count = os.copy_file_range(source, target, ref.nbytes - done, offset + done, ref.offset + done)
            if count == 0:
                raise RunError(
                    f"{path} ends early: it changed while it was read", "restore it and run the same command again"
                )
            done += count
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise
    finally:
        os.close(source)
    return True


def _check_ours(staging: Path) -> None:
    """Refuse a folder that somebody else filled: it would be published, or removed."""
    ours = {JOURNAL, MANIFEST_NAME}  # the journal goes last, when the manifest is there
    if staging.exists() and any(staging.iterdir()) and not any((staging / name).is_file() for name in ours):
        expected = "an unfinished output of safeshard"
        raise RequestError(Offence(str(staging), "", expected, "another folder", "remove it yourself"))


def _discard(staging: Path) -> None:
    journal = staging / JOURNAL
    if journal.is_file():
        Journal.claim(journal).close()
    shutil.rmtree(staging)
