"""Whole processes timed from outside, with their peak memory, cold or warm, and what they wrote in their manifests."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safeshard.bench.rows import record
from safeshard.manifests import MANIFEST_NAME
from safeshard.manifests.errors import RunError
from safeshard.manifests.safetensors_header import Header, read_header

SAFESHARD = (sys.executable, "-m", "safeshard")
# The least that a job in Python does: import torch and safetensors, and read once each tensor that it needs.
READ = """
import re, sys, torch
from safetensors import safe_open
for path in sys.argv[2:]:
    with safe_open(path, "pt", backend="pread") as file:
        for name in file.keys():
            if re.search(sys.argv[1], name):
                file.get_tensor(name)
"""
# Linux counts the memory of the process that starts another into the other's peak, so a small one starts it.
TIMER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
seconds, processor = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps([seconds, processor, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)]))
"""


@dataclass(frozen=True)
class Sample:
    """One run, or the median of several.

    Wall seconds, peak resident and device bytes, bytes read and written, thread-seconds by stage, and the processor's
    seconds; 0 or nothing where the run does not tell.
    """

    seconds: float
    peak: int = 0
    device_peak: int = 0
    nbytes: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)
    processor: float = 0.0


@dataclass(frozen=True)
class Bench:
    """How to measure: what is common to all rows of a run. `files` are all those that its jobs read."""

    label: str
    files: Sequence[Path]
    runs: int
    cold: bool
    file: str = "pipeline"

    def measure(
        self, what: str, job: Callable[[], Sample], *, floor: float = 0.0, against: tuple[str, Sample] | None = None,
        **columns: Any,
    ) -> Sample:  # fmt: skip
        """Repeat `job`; append and print a row; return the median run, with the highest peaks of all.

        Args:
            floor: seconds of a process that reads the same bytes.
            against: the name and the result of what the job is compared with.
        """
        (samples,) = self._samples([job])
        return self._record(what, samples, floor, against, columns)

    def measure_in_turn(self, jobs: Mapping[str, Callable[[], Sample]], *, floor: str, **columns: Any) -> None:
        """Repeat jobs one after the other, so that all meet the machine alike; append and print a row of each.

        `floor` names the one whose rate is what the others' could be.
        """
        taken = dict(zip(jobs, self._samples(list(jobs.values())), strict=True))
        a_byte = statistics.median(sample.seconds for sample in taken[floor]) / taken[floor][0].nbytes
        for what, samples in taken.items():
            own = {} if what == floor else {"ceiling": floor}
            self._record(what, samples, a_byte * samples[0].nbytes if own else 0.0, None, own | columns)

    def _samples(self, jobs: Sequence[Callable[[], Sample]]) -> list[list[Sample]]:
        """So many runs of each job, in turn; the first warm ones fill the cache and do not count."""
        samples: list[list[Sample]] = [[] for _ in jobs]
        for _ in range(self.runs + (not self.cold)):
            for own, job in zip(samples, jobs, strict=True):
                if self.cold:
                    drop_caches(self.files)
                own.append(job())
        return [own[-self.runs :] for own in samples]

    def _record(
        self, what: str, samples: Sequence[Sample], floor: float, against: tuple[str, Sample] | None,
        columns: Mapping[str, Any],
    ) -> Sample:  # fmt: skip
        middle = sorted(samples, key=lambda s: s.seconds)[len(samples) // 2]
        result = replace(
            middle, seconds=statistics.median(s.seconds for s in samples), peak=max(s.peak for s in samples),
            device_peak=max(s.device_peak for s in samples),
        )  # fmt: skip
        record(
            self.file, [s.seconds for s in samples], nbytes=middle.nbytes, floor=floor, what=what, shape=self.label,
            peak_rss_bytes=result.peak or "", peak_device_bytes=result.device_peak or "", stages=middle.stages,
            **{"dtype": "bf16, adapters fp32", "ceiling": "process that reads the same bytes" * bool(floor),
               "cache": "cold" if self.cold else "warm", **_compared(result, against), **columns},
        )  # fmt: skip
        return result


def _compared(own: Sample, against: tuple[str, Sample] | None) -> dict[str, str]:
    if against is None:
        return {}
    name, other = against
    columns = {"against": name, "time_ratio": f"{other.seconds / own.seconds:.2f}"}
    return columns | ({"memory_ratio": f"{own.peak / other.peak:.3f}"} if own.peak and other.peak else {})


def drop_caches(files: Iterable[Path]) -> None:
    """Drop clean pages of the files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def tensor_files(folders: Iterable[Path]) -> list[Path]:
    """The safetensors files of some folders."""
    return [file for folder in folders for file in sorted(folder.rglob("*.safetensors"))]


def tensor_bytes(folders: Iterable[Path], pattern: str = "") -> int:
    """How many bytes the tensors hold whose names match a regular expression."""
    tensors = [tensor for file in tensor_files(folders) for tensor in _header(file).tensors.values()]
    return sum(tensor.nbytes for tensor in tensors if re.search(pattern, tensor.name))


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        return read_header(path.name, path.stat().st_size, lambda a, b: os.pread(file.fileno(), b - a, a))


def plain_read(folders: Sequence[Path], pattern: str = "") -> Sample:
    """A process that imports torch and safetensors and reads each tensor whose name matches, on one thread."""
    sample = process([sys.executable, "-c", READ, pattern, *map(str, tensor_files(folders))])
    return replace(sample, nbytes=tensor_bytes(folders, pattern))


def clean_run(outputs: Path, command: Sequence[str]) -> Sample:
    """Empty `outputs`, then run a process; take bytes, stages and device memory from the manifests that it wrote."""
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    sample = process(command)
    runs = [json.loads(manifest.read_text())["run"] for manifest in sorted(outputs.rglob(MANIFEST_NAME))]
    if not runs:
        return sample
    written = sum(run["bytes_written"] for run in runs)  # the rest is of the whole run, the same in each
    return replace(
        sample, device_peak=runs[0]["peak_device_bytes"], nbytes=runs[0]["bytes_read"] + written,
        stages={**runs[0]["seconds"], "processor": sample.processor},
    )  # fmt: skip


def process(command: Sequence[str]) -> Sample:
    """Run a process; return its wall time, its peak resident memory, and the processor's seconds.

    Raises:
        RunError: it failed; says the last it wrote to standard error.
    """
    timer = [sys.executable, "-I", "-S", "-c", TIMER, *command]
    run = subprocess.run(timer, capture_output=True, text=True, check=True)
    seconds, processor, peak, status = json.loads(run.stdout)
    if status != 0:
        raise RunError(f"{' '.join(command)[:1000]} failed with status {status}\n{run.stderr[-2000:]}")
    return Sample(seconds, peak, processor=processor)
