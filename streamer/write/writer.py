"""Writing an output so that it is there whole or not at all.

Everything is written in `OUT.partial`, beside OUT: safetensors files under a `.part` name, header first, each tensor
at its own offset in any order. When all are complete they are synced; the small files and the manifest follow; then
do the safetensors files get their names, and one rename of the folder publishes the output. What a journal calls
finished is hashed again before an interrupted run goes on from it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.manifests.hashing import hash_tensor_region
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.calibration.hidden_states import SPILL
from safeshard.streamer.clock import Clock
from safeshard.streamer.disk import (
    allocate,
    clear_errors,
    copy_range,
    open_own,
    start_writeback,
    sync_path,
    write_all,
    write_file,
)
from safeshard.streamer.plan.job_plan import Copy, OutputFile
from safeshard.streamer.plan.ours import NUMBERS
from safeshard.streamer.plan.written.places import staging_of
from safeshard.streamer.sources.direct import passes_by, pieces
from safeshard.streamer.write import staging
from safeshard.streamer.write.destinations import Destination
from safeshard.streamer.write.finite import check_copy
from safeshard.streamer.write.journal import name_and_hash
from safeshard.streamer.write.shipping import Shipping
from safeshard.streamer.write.tensor_write import TensorWrite

COMMIT_SECONDS = 5.0  # of work that a power cut may undo
CHUNK_BYTES = 1 << 22
WRITEBACK_BYTES = 1 << 22  # of small tensors that the disk is sent together: each asks for as much of the system
log = logging.getLogger(__name__)


class Writer:
    """One job's output under way, or a part of it. Thread-safe.

    Attributes:
        hashes: output tensor -> BLAKE3 of its bytes, for all tensors written so far.
        bytes_written: by this process.
        clock: the seconds of hashing and of syncing.
    """

    def __init__(
        self,
        output: Path | str,
        files: list[OutputFile],
        fingerprint: dict[str, Any],
        overwrite: bool,
        place: Destination | None = None,
        *,
        folder: Path | None = None,
        made: Mapping[str, Path] | None = None,
    ) -> None:
        """Open an output, or go on with one.

        Args:
            place: where it goes afar, besides a local `output` or as its URL.
            folder: where a part of it is kept, which never gets another name.
            made: finished safetensors files of it that lie elsewhere: those that have their size are moved here.
        """
        self.output = output if isinstance(output, str) else output.absolute()
        self.staging = folder.absolute() if folder is not None else staging_of(self.output)
        self._here = self.staging if isinstance(self.output, str) else self.output
        self.files, self.bytes_written = files, 0
        self._shipping = Shipping(place, {file.name: file.tensors.keys() for file in files})
        self._small: list[str] = []
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))  # as it is found again in a file
        self.clock = Clock()
        self._ended = False
        self.hashes: dict[str, str] = {}
        self._regions: dict[str, int] = {}  # of a tensor that is written region by region, the bytes written
        self._places = {name: (file.name, ref) for file in files for name, ref in file.tensors.items()}
        self._fds: dict[str, int] = {}
        self._unsent: dict[int, tuple[int, int, int]] = {}  # of a file: from where to where, and how many bytes
        self._lock = threading.Lock()
        self._committed = time.monotonic()
        with clear_errors(self.staging):
            self._shipping.recover(self.staging)
            self.journal = staging.open_journal(self.staging, self._here, fingerprint, overwrite)
        try:
            recorded = dict(self.journal.sound("tensor", name_and_hash))
            with clear_errors(self.staging):
                self.journal.sign()
                there = self._shipping.begin(self.journal)
                for spill in self.staging.glob("*".join(SPILL)):  # of a run killed before it could unname it
                    spill.unlink()
                staging.unname(self.staging, self._names)
                self._moved = self._move(made or {}) | there
                for file in files:
                    self._open(file)
                sync_path(self.staging)
                self.hashes = self._intact(recorded, there)
            self._send_complete(self.hashes)
        except BaseException:
            self._shipping.stop()
            self.close_files()
            if place is not None and not self.journal.entries("tensor"):  # the place was refused
                self._remove()
            self.journal.close()
            raise

    @property
    def _names(self) -> list[str]:
        return [file.name for file in self.files]

    def _move(self, made: Mapping[str, Path]) -> set[str]:
        """Move finished files here that lie elsewhere still and have their size."""
        sizes = {file.name: file.nbytes for file in self.files}
        there = {name: path for name, path in made.items() if path.is_file() and not path.is_symlink()}
        there = {name: path for name, path in there.items() if path.stat().st_size == sizes[name]}
        if there:
            self.journal.record("moved", files=sorted(there))  # first: what holds others' work is never removed
            self.journal.commit()
        for name, path in there.items():
            path.replace(staging.part_of(self.staging, name))
            sync_path(self.staging)
            sync_path(path.parent)
        return set(there)

    def adopt(self, hashes: Mapping[str, str]) -> None:
        """Count tensors of finished files as written, given their hashes.

        Of a file that an earlier run had moved here, those whose bytes are there. A file that lies at the place afar
        is the one that these hashes name: the place knows it by them.
        """
        new = {name: digest for name, digest in hashes.items() if self.hashes.get(name) != digest}
        moved = {name: digest for name, digest in new.items() if self._places[name][0] in self._moved}
        for name, digest in (moved | self._intact({n: d for n, d in new.items() if n not in moved}, set())).items():
            self.hashes[name] = digest
            self.record("tensor", name=name, blake3=digest)

    def _open(self, file: OutputFile) -> None:
        part = staging.part_of(self.staging, file.name)
        fd = self._fds[file.name] = open_own(part, os.O_RDWR | os.O_CREAT)
        if self._shipping.frees:  # it takes room as it fills, and gives it back once it is afar
            os.ftruncate(fd, file.nbytes)
        elif os.fstat(fd).st_size != file.nbytes:
            allocate(fd, file.nbytes)
        write_all(fd, memoryview(file.header), 0)
        self.bytes_written += len(file.header)

    def _intact(self, recorded: dict[str, str], afar: set[str]) -> dict[str, str]:
        """Of the tensors that the journal calls finished, those whose bytes are there; the others are done again.

        `afar` are the files that lie at the place afar as they were brought there.
        """

        def is_there(name: str) -> bool:
            file, ref = self._places[name]
            return file in afar or self._hash_region(self._fds[file], ref) == recorded[name]

        names = [name for name in recorded if name in self._places]
        with ThreadPoolExecutor(2) as pool:
            intact = {
                name: recorded[name] for name, there in zip(names, pool.map(is_there, names), strict=True) if there
            }
        if lost := recorded.keys() - intact.keys():
            log.warning("%s: %d finished tensors are gone or damaged, and are written again", self.staging, len(lost))
        return intact

    def _send_complete(self, tensors: Iterable[str]) -> None:
        """Send the files off that are complete with these tensors."""
        for name in self._shipping.finished(tensors):
            part = staging.part_of(self.staging, name)
            self._shipping.give(name, part, self.commit, partial(os.ftruncate, self._fds[name], 0))

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
            tensor = [tensor]
        under_way = self.begin(name)
        for piece in tensor:
            under_way.add_tensor(piece)
        under_way.finish()

    def begin(self, name: str, start: int = 0, count: int | None = None) -> TensorWrite:
        """Begin to write a tensor piece by piece; it counts once it is finished.

        With `count` it is a region of so many elements from the `start`-th on; the tensor counts once all of its
        regions are finished.
        """
        return TensorWrite(self, name, start, count)

    def copy(self, copy: Copy) -> None:
        """Take over a tensor's bytes, through the kernel where the input is a local file.

        Raises:
            NotFiniteError: it holds NaN or infinity.
            RunError: reading or writing failed.
        """
        file, ref = self._places[copy.name]
        fd = self._fds[file]
        if passes_by(copy.source, copy.ref.offset, copy.ref.item_bytes):
            self._finished(copy.name, self._copy_past_cache(copy, fd, ref), ref.nbytes)
            return
        path = copy.source.local_path(copy.ref.file)
        with clear_errors(self._here):
            if path is None or not copy_range(path, fd, copy.ref.offset, ref):
                buffer = bytearray(min(CHUNK_BYTES, ref.nbytes))
                for begin in range(0, ref.nbytes, CHUNK_BYTES):
                    view = memoryview(buffer)[: min(CHUNK_BYTES, ref.nbytes - begin)]
                    copy.source.readinto(copy.ref.file, copy.ref.offset + begin, view)
                    write_all(fd, view, ref.offset + begin)
            digest = self._hash_region(fd, ref, partial(check_copy, copy))
        self._finished(copy.name, digest, ref.nbytes)

    def _copy_past_cache(self, copy: Copy, fd: int, ref: TensorRef) -> str:
        """Take over bytes that are read past the page cache, hashed as they pass; returns the hash."""
        hasher, offset = blake3(), ref.offset
        for piece in pieces(copy.source, copy.ref.file, copy.ref.offset, ref.nbytes, CHUNK_BYTES):
            check_copy(copy, piece)
            with clear_errors(self._here):
                write_all(fd, piece, offset)
            start = time.perf_counter()
            hasher.update(piece)
            self.clock.add("hash", start)
            offset += len(piece)
        start_writeback(fd, ref.offset, ref.nbytes)
        return hasher.hexdigest()

    def record(self, kind: str, **payload: Any) -> None:
        """Note something in the journal; durable with the next commit."""
        self.journal.record(kind, **payload)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make all that was written and noted so far durable."""
        self._committed = time.monotonic()
        with clear_errors(self._here):
            self.journal.commit(sync=self._sync)

    def complete(self) -> None:
        """Sync the safetensors files. All tensors must be written."""
        missing = self._places.keys() - self.hashes.keys()
        assert not missing, f"tensors not written: {sorted(missing)[:3]}"
        self._shipping.wait()
        self.commit()
        with clear_errors(self._here):
            self._sync()
            self.close_files()
            staging.clear(self.staging, self._names)

    def add_file(self, name: str, data: bytes) -> None:
        """Write one small file, synced."""
        with clear_errors(self._here):
            write_file(self.staging / name, data)
        self._small.append(name)
        self.bytes_written += len(data)

    def end_part(self) -> None:
        """Let a part stay where it is, or bring it to its folder afar. Its record must be in place."""
        if isinstance(self.output, str):
            self.publish(overwrite=False)
        else:
            with clear_errors(self._here):
                sync_path(self.staging)
            self.journal.close()
            self._ended = True

    def publish(self, overwrite: bool) -> None:
        """Give the finished folder its name, and bring it to its place afar. The manifest must be in place."""
        if isinstance(self.output, str):
            parts = {name: staging.part_of(self.staging, name) for name in self._names}
            self._shipping.publish(parts | {name: self.staging / name for name in self._small})
            self._remove()
        else:
            with clear_errors(self._here):
                staging.publish(self.staging, self.output, self._names, overwrite)
        self.journal.close()
        self._ended = True
        if not isinstance(self.output, str):
            try:
                self._shipping.publish({name: self.output / name for name in (*self._names, *self._small)})
            except RunError as error:
                raise RunError(f"{error.message}; {self.output} itself is finished", error.remedy) from error

    def abandon(self) -> None:
        """Release everything; what was finished stays for a resume, and where nothing was, no trace is left."""
        if self._ended:
            return
        self._ended = True
        self._shipping.stop()
        try:
            if self.staging.exists():
                self.commit()
        finally:
            self.close_files()
            begun = any(self.journal.entries(kind) for kind in ("tensor", "module", "cosine", "curve", "moved"))
            begun |= (self.staging / NUMBERS).exists()  # of a part without modules, too
            if not begun and self.staging.exists():
                self._shipping.forget()
                self._remove()
            self.journal.close()

    def discard(self) -> None:
        """Remove what was written, finished or not, here and afar."""
        self._ended = True
        self._shipping.forget()
        self.close_files()
        self._remove()
        self.journal.close()

    def _remove(self) -> None:
        with clear_errors(self.staging):
            staging.remove(self.staging, self._here)

    def close_files(self) -> None:
        """Release the safetensors files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _sync(self) -> None:
        start = time.perf_counter()
        for fd in self._fds.values():
            os.fsync(fd)
        self.clock.add("sync", start)

    def _hash_region(self, fd: int, ref: TensorRef, check: Callable[[memoryview], None] | None = None) -> str:
        start = time.perf_counter()
        with clear_errors(self._here / ref.file):
            digest = hash_tensor_region(fd, ref.offset, ref.nbytes, check=check)
        self.clock.add("hash", start)
        return digest

    def _begin_writeback(self, fd: int, begin: int, nbytes: int) -> None:
        """Let the kernel bring to the disk what was written, once it is enough; the sync takes the rest."""
        with self._lock:
            start, stop, count = self._unsent.pop(fd, (begin, begin, 0))
            start, stop, count = min(start, begin), max(stop, begin + nbytes), count + nbytes
            if count < WRITEBACK_BYTES:
                self._unsent[fd] = start, stop, count
                return
        start_writeback(fd, start, stop - start)

    def _finished_region(self, name: str, nbytes: int) -> None:
        """Note a region as written; of a tensor whose regions all are, take the hash: they come in any order."""
        file, ref = self._places[name]
        with self._lock:
            self._regions[name] = self._regions.get(name, 0) + nbytes
            complete = self._regions[name] == ref.nbytes
        if complete:
            self._finished(name, self._hash_region(self._fds[file], ref), ref.nbytes)

    def _finished(self, name: str, digest: str, nbytes: int) -> None:
        with self._lock:
            self.hashes[name] = digest
            self.bytes_written += nbytes
        self.record("tensor", name=name, blake3=digest)
        self._send_complete([name])
