"""Whole jobs as a user runs them: a process each, timed from outside, against plainly reading the same bytes."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safeshard.bench.models import SHAPES, make_models
from safeshard.bench.rows import append
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.checkpoint import open_checkpoint
from safeshard.streamer.sources import Source, open_source

READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Bench:
    """How to measure: what is common to all rows of a run."""

    label: str
    files: Sequence[Path]
    runs: int
    cold: bool
    file: str = "pipeline"

    def measure(self, what: str, job: Callable[[], tuple[float, int]], nbytes: int = 0, floor: float = 0.0) -> float:
        """Repeat `job`, which returns seconds and peak bytes; append and print a row; return the median seconds."""
        seconds, peaks = [], []
        for _ in range(self.runs + (not self.cold)):  # the first warm run fills the cache and does not count
            if self.cold:
                drop_caches(self.files)
            wall, peak = job()
            seconds.append(wall)
            peaks.append(peak)
        seconds = seconds[-self.runs :]
        median, cache = statistics.median(seconds), "cold" if self.cold else "warm"
        append(self.file, {
            "what": what, "shape": self.label, "dtype": "bf16, adapters fp32", "median_s": f"{median:.3f}",
            "min_s": f"{min(seconds):.3f}", "max_s": f"{max(seconds):.3f}", "runs": len(seconds), "bytes": nbytes,
            "GB_per_s": f"{nbytes / median / 1e9:.2f}", "ceiling": "plain read" if floor else "",
            "share_of_ceiling": f"{floor / median:.3f}" if floor else "", "peak_rss_bytes": max(peaks), "cache": cache,
        })  # fmt: skip
        rate = f"{nbytes / median / 1e9:6.2f} GB/s" if nbytes else " " * 11
        print(f"{what:42} {median:7.2f} s {rate}  peak {max(peaks) / 1e9:5.2f} GB  {cache}", flush=True)
        return median


def run(
    folder: Path, shape: str, layers: int | None, adapters: Sequence[int], runs: int, cold: bool, full: bool
) -> None:
    """Measure reading, importing, and SafeMERGE with each number of adapters; append a row each and print it.

    Args:
        folder: where the models are made (kept) and the outputs written (removed, in a folder of their own).
        shape: a name of `models.SHAPES`.
        layers: decoder layers, or None for the shape's own.
        adapters: numbers of fine-tuned adapters in one batch.
        runs: repetitions; the median is reported.
        cold: drop the files from the page cache before each run.
        full: also measure full checkpoints.
    """
    size = SHAPES[shape]
    layers = layers or size.layers
    paths = make_models(folder, size, layers=layers, adapters=max(adapters), rank=16, finetuned=full)
    files = sorted(file for path in paths.values() for file in path.glob("*.safetensors"))
    bench = Bench(f"{shape} x{layers} layers", files, runs, cold)
    pair = [(paths[name], ref) for name in ("aligned", "unaligned") for ref in _linears(paths[name])]
    gate_bytes = sum(ref.nbytes for _, ref in pair)
    floor = bench.measure("plain read of the decoder linears", partial(_plain_read, pair), gate_bytes)
    bench.measure("start Python and import torch", partial(_process, [sys.executable, "-c", "import torch"]))
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        outputs = Path(scratch, "outputs")
        for count in adapters:
            read = gate_bytes + _file_bytes(paths, ["safe", *(f"adapter-{i}" for i in range(count))])
            job = partial(clean_run, outputs, _merge_command(Path(scratch), outputs, paths, count))
            bench.measure(f"safemerge, {count} adapter{'s' * (count > 1)}", job, read, floor)
        if full:
            for what, (command, names) in _full_commands(paths, outputs / "full").items():
                bench.measure(what, partial(clean_run, outputs, command), _file_bytes(paths, names))


def _file_bytes(paths: dict[str, Path], names: Iterable[str]) -> int:
    return sum(file.stat().st_size for name in names for file in paths[name].glob("*.safetensors"))


def drop_caches(files: Iterable[Path]) -> None:
    """Drop clean pages of the files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _linears(path: Path) -> list[TensorRef]:
    return list(open_checkpoint(open_source(path)).linears.values())


def _plain_read(places: Sequence[tuple[Path, TensorRef]], threads: int = 2) -> tuple[float, int]:
    """Read byte ranges into one small buffer a thread: what any method must at least do."""
    sources: dict[Path, Source] = {path: open_source(path) for path, _ in places}
    local = threading.local()

    def read(place: tuple[Path, TensorRef]) -> None:
        path, ref = place
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(READ_BYTES))
        for begin in range(0, ref.nbytes, READ_BYTES):
            sources[path].readinto(ref.file, ref.offset + begin, local.buffer[: min(READ_BYTES, ref.nbytes - begin)])

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, places))
    return time.perf_counter() - start, threads * READ_BYTES


def _merge_command(scratch: Path, outputs: Path, paths: dict[str, Path], count: int) -> list[str]:
    common = {"aligned": paths["aligned"], "unaligned": paths["unaligned"], "safe_adapter": paths["safe"]}
    base = [sys.executable, "-m", "safeshard.streamer.cli"]
    if count == 1:
        options = [x for name, path in common.items() for x in (f"--{name.replace('_', '-')}", str(path))]
        return [
            *base,
            "safemerge",
            *options,
            "--adapter",
            str(paths["adapter-0"]),
            "--output",
            str(outputs / "one"),
        ]
    jobs = scratch / f"jobs-{count}.yaml"
    lines = ["defaults:", *(f"  {name}: {path}" for name, path in common.items()), "jobs:"]
    lines += ["  - method: safemerge", "    matrix:", "      adapter:"]
    lines += [f"        - {paths[f'adapter-{i}']}" for i in range(count)]
    lines += [f"    output: {outputs}/{{adapter}}"]
    jobs.write_text("\n".join(lines) + "\n")
    return [*base, "batch", str(jobs)]


def _full_commands(paths: dict[str, Path], output: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What -> the command, and the names of the checkpoints that it reads."""
    base = [sys.executable, "-m", "safeshard.streamer.cli"]
    inputs = ["--aligned", str(paths["aligned"]), "--finetuned", str(paths["finetuned"]), "--output", str(output)]
    safe = ["--unaligned", str(paths["unaligned"]), "--safe", str(paths["finetuned-safe"])]
    return {
        "scale, full checkpoint": ([*base, "scale", *inputs, "--factor", "0.5"], ["aligned", "finetuned"]),
        "safemerge, full checkpoint": (
            [*base, "safemerge", *inputs, *safe], ["aligned", "unaligned", "finetuned", "finetuned-safe"],
        ),
    }  # fmt: skip


def clean_run(outputs: Path, command: Sequence[str]) -> tuple[float, int]:
    """Empty `outputs`, then run a process; return its wall time in seconds and its peak resident memory in bytes."""
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    return _process(command)


def _process(command: Sequence[str]) -> tuple[float, int]:
    """Run a process; return its wall time in seconds and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return wall, usage.ru_maxrss * 1024
