"""Writing an output so that it is there whole or not at all.

Everything is written in `OUT.partial`, beside OUT: safetensors files under a `.part` name, header first, each tensor
at its own offset in any order. When all are complete they are synced; the small files and the manifest follow; then
do the safetensors files get their names, and one rename of the folder publishes the output. What a journal calls
finished is hashed again before an interrupted run goes on from it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.calibration.hidden_states import SPILL
from safeshard.streamer.clock import Clock
from safeshard.streamer.disk import (
    clear_errors,
    sync_path,
    write_file,
)
from safeshard.streamer.plan.job_plan import Copy, OutputFile
from safeshard.streamer.plan.ours import NUMBERS
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.write import staging
from safeshard.streamer.write.destinations import Destination
from safeshard.streamer.write.journal import name_and_hash
from safeshard.streamer.write.part_files import PartFiles
from safeshard.streamer.write.shipping import Shipping
from safeshard.streamer.write.tensor_write import TensorWrite

COMMIT_SECONDS = 5.0  # of work that a power cut may undo
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
        self._parts = PartFiles(self.staging, self._here, files, self.clock)
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
                    self._parts.open(file, sparse=self._shipping.frees)
                    self.bytes_written += len(file.header)
                sync_path(self.staging)
                self.hashes = self._intact(recorded, there)
            self._send_complete(self.hashes)
        except BaseException:
            self._shipping.stop()
            self._parts.close()
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
        moved = {name: digest for name, digest in new.items() if self._parts.file(name) in self._moved}
        for name, digest in (moved | self._intact({n: d for n, d in new.items() if n not in moved}, set())).items():
            self.hashes[name] = digest
            self.record("tensor", name=name, blake3=digest)

    def _intact(self, recorded: Mapping[str, str], afar: Set[str]) -> dict[str, str]:
        """Of the tensors that the journal calls finished, those whose bytes are there; the others are done again."""
        intact = self._parts.intact(recorded, afar)
        if lost := recorded.keys() - intact.keys():
            log.warning("%s: %d finished tensors are gone or damaged, and are written again", self.staging, len(lost))
        return intact

    def _send_complete(self, tensors: Iterable[str]) -> None:
        """Send the files off that are complete with these tensors."""
        for name in self._shipping.finished(tensors):
            part = staging.part_of(self.staging, name)
            self._shipping.give(name, part, self.commit, partial(self._parts.empty, name))

    def place(self, name: str) -> TensorRef:
        """Where an output tensor goes: its dtype, shape, offset."""
        return self._parts.ref(name)

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
        self._finished(copy.name, self._parts.copy(copy), self.place(copy.name).nbytes)

    def record(self, kind: str, **payload: Any) -> None:
        """Note something in the journal; durable with the next commit."""
        self.journal.record(kind, **payload)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make all that was written and noted so far durable."""
        self._committed = time.monotonic()
        with clear_errors(self._here):
            self.journal.commit(sync=self._parts.sync)

    def complete(self) -> None:
        """Sync the safetensors files. All tensors must be written."""
        missing = self._parts.tensors - self.hashes.keys()
        assert not missing, f"tensors not written: {sorted(missing)[:3]}"
        self._shipping.wait()
        self.commit()
        with clear_errors(self._here):
            self._parts.sync()
            self._parts.close()
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
            self._parts.close()
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
        self._parts.close()
        self._remove()
        self.journal.close()

    def _remove(self) -> None:
        with clear_errors(self.staging):
            staging.remove(self.staging, self._here)

    def _finished_region(self, name: str, nbytes: int) -> None:
        """Note a region as written; of a tensor whose regions all are, take the hash: they come in any order."""
        whole = self.place(name).nbytes
        with self._lock:
            self._regions[name] = self._regions.get(name, 0) + nbytes
            complete = self._regions[name] == whole
        if complete:
            self._finished(name, self._parts.hash(name), whole)

    def _finished(self, name: str, digest: str, nbytes: int) -> None:
        with self._lock:
            self.hashes[name] = digest
            self.bytes_written += nbytes
        self.record("tensor", name=name, blake3=digest)
        self._send_complete([name])
