"""Result rows: every run appends, nothing is overwritten; tables and plots come from these rows alone."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safeshard.bench.toy import table

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "what", "shape", "dtype", "median_s", "min_s", "max_s", "runs", "bytes", "GB_per_s", "ceiling", "share_of_ceiling",
    "peak_rss_bytes", "cache", "versions", "hardware", "commit", "date",
)  # fmt: skip


def append(file: str, row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Add one row to bench/results/<file>.csv. Keys outside of `columns` are errors; missing ones stay empty."""
    unknown = row.keys() - set(columns)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}")
    path = RESULTS / f"{file}.csv"
    new = not path.exists()
    RESULTS.mkdir(exist_ok=True)
    with path.open("a", newline="") as out:
        rows = csv.DictWriter(out, columns, lineterminator="\n")
        if new:
            rows.writeheader()
        rows.writerow({**environment(), **row})


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
    return f"{model} x{len(os.sched_getaffinity(0))}{gpu}"


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "unknown"


def markdown(file: str) -> str:
    """The newest row of each measurement in bench/results/<file>.csv, as a Markdown table."""
    path = RESULTS / f"{file}.csv"
    with path.open(newline="") as lines:
        newest = {(row["what"], row["shape"], row["cache"]): row for row in csv.DictReader(lines)}
    table = [
        "| what | shape | cache | median | spread | GB/s | share of plain reading | peak memory | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in newest.values():
        spread = f"{float(row['min_s']):.2f}-{float(row['max_s']):.2f} s"
        share = f"{100 * float(row['share_of_ceiling']):.0f} %" if row["share_of_ceiling"] else ""
        rate = row["GB_per_s"] if float(row["bytes"] or 0) else ""
        peak = f"{float(row['peak_rss_bytes']) / 1e9:.2f} GB"
        cells = [row["what"], row["shape"], row["cache"], f"{float(row['median_s']):.2f} s", spread, rate, share, peak]
        table.append("| " + " | ".join([*cells, row["commit"]]) + " |")
    return "\n".join(table) + "\n"


def documents() -> list[Path]:
    """The documents that show tables of rows."""
    here = Path(__file__).resolve().parent
    return [here / "README.md", here.parent / "README.md"]


def refresh(document: Path) -> str:
    """The text of a Markdown document with the tables between its `rows` markers made anew."""
    text = document.read_text()
    pattern = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: m[1] + _shown(m[2]) + m[3], text)


def _shown(name: str) -> str:
    """The text between two markers: a table of measurements, or what the toy experiment's rows show."""
    if name not in ("toy", "toy_findings"):
        return markdown(name)
    rows = table.read(RESULTS / "toy.csv")
    return table.markdown(rows) if name == "toy" else "".join(f"- {sentence}\n" for sentence in table.findings(rows))
