"""Whole jobs as a user runs them: a process each, timed from outside, against plainly reading the same bytes."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safeshard.bench.models import SHAPES, make_models
from safeshard.bench.results import append
from safeshard.streamer.checkpoint import open_checkpoint
from safeshard.streamer.header import TensorRef
from safeshard.streamer.sources import Source, open_source

READ_BYTES = 8 << 20


def run(
    folder: Path, shape: str, layers: int | None, adapters: Sequence[int], runs: int, cold: bool, full: bool
) -> None:
    """Measure reading, importing, and SafeMERGE with each number of adapters; append a row each and print it.

    Args:
        folder: where the models are made (kept) and the outputs written (removed).
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
    label, cache = f"{shape} x{layers} layers", "cold" if cold else "warm"

    def measure(what: str, job: Callable[[], tuple[float, int]], nbytes: int, ceiling: float | None) -> float:
        seconds, peaks = [], []
        for _ in range(runs + (not cold)):  # the first warm run fills the cache
            if cold:
                drop_caches(files)
            wall, peak = job()
            seconds.append(wall)
            peaks.append(peak)
        seconds = seconds if cold else seconds[1:]
        median = statistics.median(seconds)
        share = f"{ceiling / median:.3f}" if ceiling else ""
        append("pipeline", {
            "what": what, "shape": label, "dtype": "bf16, adapters fp32", "median_s": f"{median:.3f}",
            "min_s": f"{min(seconds):.3f}", "max_s": f"{max(seconds):.3f}", "runs": len(seconds), "bytes": nbytes,
            "GB_per_s": f"{nbytes / median / 1e9:.2f}" if nbytes else "", "ceiling": "plain read" if ceiling else "",
            "share_of_ceiling": share, "peak_rss_bytes": max(peaks), "cache": cache,
        })  # fmt: skip
        rate = f"{nbytes / median / 1e9:6.2f} GB/s" if nbytes else " " * 11
        print(f"{what:42} {median:7.2f} s {rate}  peak {max(peaks) / 1e9:5.2f} GB  {cache}", flush=True)
        return median

    pair = [(paths[name], r) for name in ("aligned", "unaligned") for r in _linears(paths[name])]
    gate_bytes = sum(ref.nbytes for _, ref in pair)
    floor = measure("plain read of the decoder linears", lambda: _plain_read(pair), gate_bytes, None)
    measure("start Python and import torch", lambda: _process([sys.executable, "-c", "import torch"]), 0, None)
    for count in adapters:
        command = _merge_command(folder, paths, count)
        outputs = folder / "outputs"
        nbytes = gate_bytes + sum(f.stat().st_size for name in ["safe", *(f"adapter-{i}" for i in range(count))]
                                  for f in paths[name].glob("*.safetensors"))  # fmt: skip
        measure(f"safemerge, {count} adapter{'s' * (count > 1)}", lambda c=command: _clean(outputs, c), nbytes, floor)
    if full:
        for what, options in _full_commands(paths, folder / "outputs" / "full").items():
            names = ["aligned", "finetuned"] + ["unaligned", "finetuned-safe"] * (what == "safemerge, full checkpoint")
            nbytes = sum(f.stat().st_size for name in names for f in paths[name].glob("*.safetensors"))
            measure(what, lambda o=options: _clean(folder / "outputs", o), nbytes, None)


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


def _merge_command(folder: Path, paths: dict[str, Path], count: int) -> list[str]:
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
            str(folder / "outputs" / "one"),
        ]
    jobs = folder / f"jobs-{count}.yaml"
    lines = ["defaults:", *(f"  {name}: {path}" for name, path in common.items()), "jobs:"]
    lines += ["  - method: safemerge", "    matrix:", "      adapter:"]
    lines += [f"        - {paths[f'adapter-{i}']}" for i in range(count)]
    lines += [f"    output: {folder / 'outputs'}/{{adapter}}"]
    jobs.write_text("\n".join(lines) + "\n")
    return [*base, "batch", str(jobs)]


def _full_commands(paths: dict[str, Path], output: Path) -> dict[str, list[str]]:
    base = [sys.executable, "-m", "safeshard.streamer.cli"]
    inputs = ["--aligned", str(paths["aligned"]), "--finetuned", str(paths["finetuned"]), "--output", str(output)]
    safe = ["--unaligned", str(paths["unaligned"]), "--safe", str(paths["finetuned-safe"])]
    return {
        "scale, full checkpoint": [*base, "scale", *inputs, "--factor", "0.5"],
        "safemerge, full checkpoint": [*base, "safemerge", *inputs, *safe],
    }


def _clean(outputs: Path, command: Sequence[str]) -> tuple[float, int]:
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
