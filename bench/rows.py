"""Result rows: every run appends, nothing is overwritten; tables and plots come from these rows alone."""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IN_CHECKOUT = (HERE.parent / "pyproject.toml").is_file()
RESULTS = HERE / "results" if IN_CHECKOUT else Path("bench-results")
DEFAULT_RESULTS = RESULTS
COLUMNS = (
    "what", "shape", "dtype", "backend", "layers", "adapters", "rank", "median_s", "min_s", "max_s", "runs", "bytes",
    "GB_per_s", "operations", "TFLOP_per_s", "ceiling", "share_of_ceiling", "against", "time_ratio", "memory_ratio",
    "peak_rss_bytes", "peak_device_bytes", "cache", "stages", "versions", "hardware", "commit", "date",
)  # fmt: skip

# No longer measured: "plain read: ..." and "preadv into new pages" took their place.
RETIRED = {"plain read of the decoder linears", "preadv into fresh memory"}


def append(file: str, row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Add one row to bench/results/<file>.csv. Keys outside of `columns` are errors; missing ones stay empty."""
    unknown = row.keys() - set(columns)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}")
    path = RESULTS / f"{file}.csv"
    new = not path.exists()
    if not new and path.read_text().splitlines()[:1] != [",".join(columns)]:
        raise ValueError(f"{path} has other columns: move it away, or choose another --results")
    RESULTS.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as out:
        rows = csv.DictWriter(out, columns, lineterminator="\n")
        if new:
            rows.writeheader()
        rows.writerow({**environment(), **row})


def write_table(file: Path, found: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as a file of their own, whole or not at all."""
    part = file.with_suffix(".part")
    with part.open("w", newline="") as out:
        table = csv.DictWriter(out, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(found)
    part.replace(file)


def record(
    file: str, seconds: Sequence[float], *, nbytes: int = 0, operations: int = 0, floor: float = 0.0, **columns: Any
) -> float:
    """Append and print a row of repeated timings; return their median.

    Args:
        file: the table, bench/results/<file>.csv.
        seconds: one a run.
        nbytes: read and written, in all.
        operations: floating-point operations.
        floor: the time of the ceiling that `columns["ceiling"]` names, in seconds.
        columns: further columns; `stages` is a mapping of seconds.
    """
    median = statistics.median(seconds)
    row = {
        "median_s": f"{median:.4g}", "min_s": f"{min(seconds):.4g}", "max_s": f"{max(seconds):.4g}",
        "runs": len(seconds), **columns,
    }  # fmt: skip
    if nbytes:
        row |= {"bytes": nbytes, "GB_per_s": f"{nbytes / median / 1e9:.2f}"}
    if operations:
        row |= {"operations": operations, "TFLOP_per_s": f"{operations / median / 1e12:.4g}"}
    if floor:
        row["share_of_ceiling"] = f"{floor / median:.3f}"
    if "stages" in row:
        stages = row["stages"]
        row["stages"] = " ".join(f"{name}={value:.3f}" for name, value in sorted(stages.items()))
    append(file, row)
    rates = [f"{nbytes / median / 1e9:.2f} GB/s"] if nbytes else []
    rates += [f"{operations / median / 1e9:.1f} GFLOP/s"] if operations else []
    rates += [f"{floor / median:.0%} of {columns.get('ceiling') or 'its ceiling'}"] if floor else []
    rate = ", ".join(rates)
    if row.get("against"):
        memory = f", {row['memory_ratio']} times its memory" if "memory_ratio" in row else ""
        rate += f"; {row['against']} takes {row['time_ratio']} times as long{memory}"
    of = f"{row['adapters']} of rank {row['rank']}" if row.get("adapters") and row.get("rank") else ""
    name = ", ".join(filter(None, (row["what"], row.get("backend") or row.get("dtype"), of)))
    print(f"{name:56} {row.get('shape', ''):22} {median:10.4g} s  {rate}", flush=True)
    return median


def read(file: str) -> list[dict[str, str]]:
    """The newest row of each measurement in bench/results/<file>.csv that is not retired, the first made first."""
    path = RESULTS / f"{file}.csv"
    if not path.exists():
        return []
    keys = ("what", "shape", "dtype", "backend", "adapters", "rank", "cache", "hardware")
    with path.open(newline="") as lines:
        newest = {tuple(row[key] for key in keys): row for row in csv.DictReader(lines)}
    return [row for row in newest.values() if row["what"] not in RETIRED]


def whole_jobs(found: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of jobs that were set against their floor, each of a model's greatest number of layers."""
    jobs = [row for row in found if row["stages"] and row["layers"] and row["share_of_ceiling"]]
    most: dict[tuple[str, str], int] = {}
    for row in jobs:
        key = model(row), row["what"]
        most[key] = max(most.get(key, 0), int(row["layers"]))
    return by_size(row for row in jobs if int(row["layers"]) == most[model(row), row["what"]])


def by_size(found: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Rows by the numbers in their shape, warm before cold."""
    return sorted(found, key=lambda row: ([int(n) for n in re.findall(r"\d+", row["shape"])], row["cache"] == "cold"))


def model(row: Mapping[str, str]) -> str:
    """The shape of a row without its number of layers: "llama-70b, 2 real"."""
    return re.sub(r" x\d+ layers", "", row["shape"])


def environment() -> dict[str, str]:
    """What a figure depends on besides the code: versions, hardware, commit and date."""
    packages = ("safeshard", "torch", "triton", "safetensors")
    return {
        "versions": " ".join([f"python={platform.python_version()}", *(f"{p}={version(p)}" for p in packages)]),
        "hardware": hardware(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def hardware() -> str:
    """Processor model, cores that may be used, and the GPU if there is one."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gpu = f" + {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model} x{cores}{gpu}"


def _commit() -> str:
    if not IN_CHECKOUT:  # else the commit of whatever repository an environment lies in
        return "unknown"
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "unknown"
