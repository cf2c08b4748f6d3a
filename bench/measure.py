"""Whole processes timed from outside, with their peak memory, cold or warm, and what they wrote in their manifests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeshard.bench.rows import record
from safeshard.manifests import MANIFEST_NAME

SAFESHARD = (sys.executable, "-m", "safeshard.streamer.cli")
# The least that a job in Python does: import torch and safetensors and read each tensor of its inputs once.
READ_ALL = """
import sys, torch
from safetensors import safe_open
for path in sys.argv[1:]:
    with safe_open(path, "pt", backend="pread") as file:
        for name in file.keys():
            file.get_tensor(name)
"""


@dataclass(frozen=True)
class Sample:
    """One run: wall seconds, peak resident and device bytes, and seconds by stage where the run has any."""

    seconds: float
    peak: int
    device_peak: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """How to measure: what is common to all rows of a run."""

    label: str
    files: Sequence[Path]
    runs: int
    cold: bool
    file: str = "pipeline"

    def measure(
        self, what: str, job: Callable[[], Sample], nbytes: int = 0, floor: float = 0.0, **columns: Any
    ) -> float:
        """Repeat `job`; append and print a row; return the median seconds."""
        samples = []
        for _ in range(self.runs + (not self.cold)):  # the first warm run fills the cache and does not count
            if self.cold:
                drop_caches(self.files)
            samples.append(job())
        samples = samples[-self.runs :]
        middle = sorted(samples, key=lambda s: s.seconds)[len(samples) // 2]
        ceiling = "process that reads the same bytes" if floor else ""
        return record(
            self.file, [s.seconds for s in samples], nbytes=nbytes, floor=floor, what=what, shape=self.label,
            **{"dtype": "bf16, adapters fp32", "ceiling": ceiling, **columns},
            peak_rss_bytes=max(s.peak for s in samples), peak_device_bytes=max(s.device_peak for s in samples) or "",
            stages=middle.stages, cache="cold" if self.cold else "warm",
        )  # fmt: skip


def drop_caches(files: Iterable[Path]) -> None:
    """Drop clean pages of the files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def tensor_files(folders: Iterable[Path]) -> list[Path]:
    """The safetensors files of some folders."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def file_bytes(folders: Iterable[Path]) -> int:
    """How many bytes the safetensors files of some folders hold."""
    return sum(file.stat().st_size for file in tensor_files(folders))


def reader(folders: Iterable[Path]) -> list[str]:
    """The command of a process that imports torch and safetensors and reads each tensor once."""
    return [sys.executable, "-c", READ_ALL, *map(str, tensor_files(folders))]


def clean_run(outputs: Path, command: Sequence[str]) -> Sample:
    """Empty `outputs`, then run a process; take stages and device memory from a manifest that it wrote there."""
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    sample = process(command)
    manifest = next(outputs.rglob(MANIFEST_NAME), None)
    if manifest is None:
        return sample
    run = json.loads(manifest.read_text())["run"]
    return Sample(sample.seconds, sample.peak, run.get("peak_device_bytes") or 0, run["seconds"])


def process(command: Sequence[str]) -> Sample:
    """Run a process; return its wall time in seconds and its peak resident memory in bytes."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return Sample(wall, usage.ru_maxrss * 1024)
