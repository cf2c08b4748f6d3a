"""The safetensors files of an output under way: open under their `.part` names, tensors at their offsets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from blake3 import blake3

from safeshard.manifests.hashing import hash_tensor_region
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.clock import Clock
from safeshard.streamer.disk import allocate, clear_errors, copy_range, open_own, start_writeback, write_all
from safeshard.streamer.plan.job_plan import Copy, OutputFile
from safeshard.streamer.sources.direct import passes_by, pieces
from safeshard.streamer.write.finite import check_copy
from safeshard.streamer.write.staging import part_of

CHUNK_BYTES = 1 << 22
WRITEBACK_BYTES = 1 << 22  # of small tensors that the disk is sent together: each asks for as much of the system


class PartFiles:
    """Thread-safe: tensors do not overlap. `output` is what errors name, `clock` counts hashing and syncing."""

    def __init__(self, staging: Path, output: Path, files: Iterable[OutputFile], clock: Clock) -> None:
        self.output = output
        self._staging, self._clock = staging, clock
        self._places = {name: (file.name, ref) for file in files for name, ref in file.tensors.items()}
        self._fds: dict[str, int] = {}
        self._unsent: dict[int, tuple[int, int, int]] = {}  # of a file: from where to where, and how many bytes
        self._lock = threading.Lock()

    def open(self, file: OutputFile, sparse: bool) -> None:
        """Open or make one, with its header; `sparse`: it takes room as it fills."""
        fd = self._fds[file.name] = open_own(part_of(self._staging, file.name), os.O_RDWR | os.O_CREAT)
        if sparse:
            os.ftruncate(fd, file.nbytes)
        elif os.fstat(fd).st_size != file.nbytes:
            allocate(fd, file.nbytes)
        write_all(fd, memoryview(file.header), 0)

    @property
    def tensors(self) -> Set[str]:
        """All that are to be written."""
        return self._places.keys()

    def file(self, name: str) -> str:
        """The file that a tensor belongs to."""
        return self._places[name][0]

    def ref(self, name: str) -> TensorRef:
        """A tensor's dtype, shape and offset."""
        return self._places[name][1]

    def fd(self, name: str) -> int:
        """The open file that a tensor belongs to."""
        return self._fds[self.file(name)]

    def hash(self, name: str, check: Callable[[memoryview], None] | None = None) -> str:
        """The BLAKE3 of a tensor as it lies in its file; `check` sees each piece."""
        start, ref = time.perf_counter(), self.ref(name)
        with clear_errors(self.output / ref.file):
            digest = hash_tensor_region(self.fd(name), ref.offset, ref.nbytes, check=check)
        self._clock.add("hash", start)
        return digest

    def intact(self, recorded: Mapping[str, str], afar: Set[str]) -> dict[str, str]:
        """Of tensors and their hashes those whose bytes are there, or whose files lie `afar` as they were brought."""
        names = [name for name in recorded if name in self._places]

        def is_there(name: str) -> bool:
            return self.file(name) in afar or self.hash(name) == recorded[name]

        with ThreadPoolExecutor(2) as pool:
            return {name: recorded[name] for name, there in zip(names, pool.map(is_there, names), strict=True) if there}

    def copy(self, copy: Copy) -> str:
        """Take over a tensor's bytes, through the kernel where the input is a local file; returns the hash.

        Raises:
            NotFiniteError: it holds NaN or infinity.
            RunError: reading or writing failed.
        """
        if passes_by(copy.source, copy.ref.offset, copy.ref.item_bytes):
            return self._copy_past_cache(copy)
        fd, ref, path = self.fd(copy.name), self.ref(copy.name), copy.source.local_path(copy.ref.file)
        with clear_errors(self.output):
            if path is None or not copy_range(path, fd, copy.ref.offset, ref):
                buffer = bytearray(min(CHUNK_BYTES, ref.nbytes))
                for begin in range(0, ref.nbytes, CHUNK_BYTES):
                    view = memoryview(buffer)[: min(CHUNK_BYTES, ref.nbytes - begin)]
                    copy.source.readinto(copy.ref.file, copy.ref.offset + begin, view)
                    write_all(fd, view, ref.offset + begin)
            return self.hash(copy.name, partial(check_copy, copy))

    def _copy_past_cache(self, copy: Copy) -> str:
        """Take over bytes that are read past the page cache, hashed as they pass."""
        fd, ref, hasher = self.fd(copy.name), self.ref(copy.name), blake3()
        offset = ref.offset
        for piece in pieces(copy.source, copy.ref.file, copy.ref.offset, ref.nbytes, CHUNK_BYTES):
            check_copy(copy, piece)
            with clear_errors(self.output):
                write_all(fd, piece, offset)
            start = time.perf_counter()
            hasher.update(piece)
            self._clock.add("hash", start)
            offset += len(piece)
        start_writeback(fd, ref.offset, ref.nbytes)
        return hasher.hexdigest()

    def begin_writeback(self, fd: int, begin: int, nbytes: int) -> None:
        """Let the kernel bring to the disk what was written, once it is enough; the sync takes the rest."""
        with self._lock:
            start, stop, count = self._unsent.pop(fd, (begin, begin, 0))
            start, stop, count = min(start, begin), max(stop, begin + nbytes), count + nbytes
            if count < WRITEBACK_BYTES:
                self._unsent[fd] = start, stop, count
                return
        start_writeback(fd, start, stop - start)

    def empty(self, file: str) -> None:
        """Give back the room of one that lies afar."""
        os.ftruncate(self._fds[file], 0)

    def sync(self) -> None:
        """Make what was written durable."""
        start = time.perf_counter()
        for fd in self._fds.values():
            os.fsync(fd)
        self._clock.add("sync", start)

    def close(self) -> None:
        """Release all of them."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
