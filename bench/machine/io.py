"""Plain reading and writing of a checkpoint's bytes: the floor of every job, by each method of reading."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from safeshard.bench.inputs.models import prepare
from safeshard.bench.machine.measure import Bench, Sample, plain_read, tensor_files

PIECE = 8 << 20
BLOCK = 4096  # direct I/O: alignment of offsets, lengths and memory
THREADS = 2


def run(folder: Path, shape: str, layers: int | None, runs: int, cold: bool) -> None:
    """Read the aligned and unaligned checkpoints by each method, write the bytes of one; append a row each."""
    label, paths = prepare(folder, shape, layers)
    folders = [paths["aligned"], paths["unaligned"]]
    files = tensor_files(folders)
    bench = Bench(label, files, runs, cold, file="io")
    for what, method in METHODS.items():
        try:
            method(files[:1])
        except (ImportError, OSError, RuntimeError, TypeError) as error:
            print(f"{what}: skipped: {error}")
            continue
        bench.measure(what, partial(_timed, method, files), dtype="bf16")
    bench.measure("a process that reads every tensor, pread", partial(plain_read, folders), dtype="bf16")
    written = sum(file.stat().st_size for file in tensor_files(folders[:1]))
    bench.measure("write and sync", partial(write, folder, written), dtype="bf16")


def _timed(method: Callable[[Sequence[Path]], None], files: Sequence[Path]) -> Sample:
    start = time.perf_counter()
    method(files)
    return Sample(time.perf_counter() - start, nbytes=sum(file.stat().st_size for file in files))


def _preadv(files: Sequence[Path], buffer_of: Callable[[int], memoryview], flags: int = 0) -> None:
    """Read whole files by two threads, each piece into what `buffer_of` gives for its length."""
    fds = {file: os.open(file, os.O_RDONLY | flags) for file in files}

    def read(place: tuple[Path, int, int]) -> None:
        file, start, stop = place
        buffer, at = buffer_of(PIECE), start
        while at < stop:
            count = os.preadv(fds[file], [buffer[at - start :]], at)
            if count == 0:
                raise OSError(f"{file} ends at byte {at}, not {stop}")
            at += count

    places = [
        (file, start, min(start + PIECE, size))
        for file in files
        for size in [file.stat().st_size]
        for start in range(0, size, PIECE)
    ]
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, places))
    finally:
        for fd in fds.values():
            os.close(fd)


def _reused() -> Callable[[int], memoryview]:
    local = threading.local()

    def buffer(size: int) -> memoryview:
        if not hasattr(local, "memory"):
            local.memory = memoryview(mmap.mmap(-1, size))  # aligned to a page, as direct I/O needs
        return memoryview(local.memory)

    return buffer


def _fresh(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size))  # an allocator would give memory back that it has used before


def _safetensors(files: Sequence[Path], **options: Any) -> None:
    """Each tensor copied into memory that is reused: a mapped tensor is not read before that."""
    target = torch.empty(0, dtype=torch.uint8)
    for path in files:
        with safe_open(path, "pt", **options) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                data = file.get_tensor(name).flatten().view(torch.uint8)
                if data.numel() > target.numel():
                    target = torch.empty(data.numel(), dtype=torch.uint8)
                target[: data.numel()].copy_(data)


def _runai(files: Sequence[Path]) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        for _ in streamer.get_tensors():
            pass


def _fastsafetensors(files: Sequence[Path]) -> None:
    from fastsafetensors import fastsafe_open

    for path in files:  # files of two models hold the same names
        with fastsafe_open([str(path)], nogds=True, device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)


METHODS: dict[str, Callable[[Sequence[Path]], None]] = {
    "preadv into a reused buffer": lambda files: _preadv(files, _reused()),
    "preadv into new pages": lambda files: _preadv(files, _fresh),
    "preadv with O_DIRECT": lambda files: _preadv(files, _reused(), os.O_DIRECT),
    "safetensors, mmap": _safetensors,
    "safetensors, pread": partial(_safetensors, backend="pread"),
    "Run:ai streamer": _runai,
    "fastsafetensors, no GDS": _fastsafetensors,
}


def write(folder: Path, nbytes: int) -> Sample:
    """Write and sync a file that is removed again; the stages tell both apart."""
    data = memoryview(bytearray(os.urandom(BLOCK)) * (PIECE // BLOCK))
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for begin in range(0, nbytes, PIECE):
            if os.pwrite(file.fileno(), part := data[: min(PIECE, nbytes - begin)], begin) < len(part):
                raise OSError(f"{folder}: a write was cut short at byte {begin}")
        written = time.perf_counter()
        os.fsync(file.fileno())
        end = time.perf_counter()
    return Sample(end - start, nbytes=nbytes, stages={"write": written - start, "sync": end - written})
