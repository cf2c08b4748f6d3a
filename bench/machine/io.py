"""Plain reading and writing of a checkpoint's bytes: the floor of every job, by each method of reading."""

from __future__ import annotations

import mmap
import os
import resource
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
from safeshard.streamer.clock import Clock
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.inputs.read import Read, Step
from safeshard.streamer.run.flow.reading import IO, choose_reading, readers_for
from safeshard.streamer.run.flow.steps import workers_for
from safeshard.streamer.run.flow.stream import Buffers, run_steps
from safeshard.streamer.sources import open_source
from safeshard.streamer.sources.direct import blocks
from safeshard.streamer.tensor_names import natural

PIECE = 8 << 20
BLOCK = 4096  # direct I/O: alignment of offsets, lengths and memory
THREADS = 2
DISK, DISK_THREADS = "the disk alone, O_DIRECT", 4
JOB_MEMORY = 2 << 30  # the default of --memory


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
    _run_jobs_reading(bench, folders, files)
    bench.measure("a process that reads every tensor, pread", partial(plain_read, folders), dtype="bf16")
    written = sum(file.stat().st_size for file in tensor_files(folders[:1]))
    bench.measure("write and sync", partial(write, folder, written), dtype="bf16")


def _run_jobs_reading(bench: Bench, folders: Sequence[Path], files: Sequence[Path]) -> None:
    """Read as a job does, each way, in turn with what the disk gives to one who only reads."""
    ways = {
        DISK: lambda: _timed(_whole_blocks, files),
        "as a job reads, --io direct": lambda: _as_a_job("direct", folders),
        "as a job reads, --io buffered": lambda: _as_a_job("buffered", folders),
    }
    bench.measure_in_turn(ways, floor=DISK, dtype="bf16")


def _whole_blocks(files: Sequence[Path]) -> None:
    """Read whole blocks past the page cache into memory that each thread has, in order and with no other thought."""
    local, fds = threading.local(), [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]

    def read(place: tuple[int, int]) -> None:
        if not hasattr(local, "memory"):
            local.memory = blocks(PIECE)
        os.preadv(place[0], [local.memory], place[1])

    try:
        with ThreadPoolExecutor(DISK_THREADS) as pool:
            list(pool.map(read, [(fd, at) for fd in fds for at in range(0, os.fstat(fd).st_size, PIECE)]))
    finally:
        for fd in fds:
            os.close(fd)


def _as_a_job(io: IO, folders: Sequence[Path]) -> Sample:
    """Read the linears of all folders through a job's buffers, and compute nothing."""
    checkpoints = [open_checkpoint(open_source(folder)) for folder in folders]
    sources = [checkpoint.source for checkpoint in checkpoints]
    choose_reading(io, sources)
    names = sorted((name for name in checkpoints[0].tensors if "_proj." in name), key=natural)
    reads = [[Read(checkpoint.source, checkpoint.tensors[name]) for checkpoint in checkpoints] for name in names]
    steps = [Step(name, {read.key: read for read in group}) for name, group in zip(names, reads, strict=True)]
    before, start = _processor(), time.perf_counter()
    run_steps(
        steps, lambda *_: None, buffers=Buffers(JOB_MEMORY), clock=Clock(), workers=workers_for(torch.device("cpu")),
        readers=readers_for(sources),
    )  # fmt: skip
    seconds, processor = time.perf_counter() - start, _processor() - before
    return Sample(seconds, nbytes=sum(step.nbytes for step in steps), stages={"processor": processor})


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _timed(method: Callable[[Sequence[Path]], None], files: Sequence[Path]) -> Sample:
    before, start = _processor(), time.perf_counter()
    method(files)
    seconds, processor = time.perf_counter() - start, _processor() - before
    return Sample(seconds, nbytes=sum(file.stat().st_size for file in files), stages={"processor": processor})


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
