"""Result rows: every run appends, nothing is overwritten; tables and plots come from these rows alone."""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safeshard.bench import in_short, support
from safeshard.bench.real import table as real_table
from safeshard.bench.toy import table, tuned

_HERE = Path(__file__).resolve().parent
IN_CHECKOUT = (_HERE.parent / "pyproject.toml").is_file()
RESULTS = _HERE / "results" if IN_CHECKOUT else Path("bench-results")
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
    rate = f"{nbytes / median / 1e9:.2f} GB/s" if nbytes else ""
    if row.get("against"):
        memory = f", {row['memory_ratio']} times its memory" if "memory_ratio" in row else ""
        rate += f"; {row['against']} takes {row['time_ratio']} times as long{memory}"
    name = ", ".join(filter(None, (row["what"], row.get("backend"))))
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


CELLS: dict[str, Callable[[dict[str, str]], str]] = {
    "what": lambda row: ", ".join(filter(None, (row["what"], row["backend"]))),
    "shape": lambda row: row["shape"],
    "dtype": lambda row: row["dtype"],
    "rank": lambda row: row["rank"],
    "adapters": lambda row: row["adapters"],
    "cache": lambda row: row["cache"],
    "median": lambda row: _seconds(row["median_s"]),
    "spread": lambda row: f"{_seconds(row['min_s'])} to {_seconds(row['max_s'])}",
    "GB/s": lambda row: row["GB_per_s"] if float(row["bytes"] or 0) else "",
    "TFLOP/s": lambda row: row["TFLOP_per_s"],
    "share of ceiling": lambda row: f"{100 * float(row['share_of_ceiling']):.0f} %" if row["share_of_ceiling"] else "",
    "compared with": lambda row: row["against"],
    "times as fast": lambda row: row["time_ratio"],
    "of its memory": lambda row: f"{100 * float(row['memory_ratio']):.0f} %" if row["memory_ratio"] else "",
    "peak memory": lambda row: f"{float(row['peak_rss_bytes']) / 1e9:.2f} GB" if row["peak_rss_bytes"] else "",
    "peak device memory": lambda row: (
        f"{float(row['peak_device_bytes']) / 1e9:.2f} GB" if row["peak_device_bytes"] else ""
    ),
    "requests in flight": lambda row: _stage(row, "in_flight"),
    "processor": lambda row: f"{seconds} s" if (seconds := _stage(row, "processor")) else "",
    "hardware": lambda row: row["hardware"],
    "commit": lambda row: row["commit"],
}


def markdown(found: Sequence[dict[str, str]], left_out: Sequence[str] = ()) -> str:
    """Rows as a Markdown table.

    Columns that say nothing are left out: empty ones, and dtype, rank and hardware where they are the same in all rows.
    """
    if not found:
        return "No rows yet.\n"
    columns = {head: [cell(row) for row in found] for head, cell in CELLS.items() if head not in left_out}
    columns = {
        head: cells for head, cells in columns.items()
        if any(cells) and (head not in ("dtype", "rank", "hardware") or len(set(cells)) > 1)
    }  # fmt: skip
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _stage(row: dict[str, str], name: str) -> str:
    found = re.search(rf"\b{name}=([\d.]+)", row["stages"])
    return f"{float(found[1]):.3g}" if found else ""


def _seconds(text: str) -> str:
    """Seconds to two decimals, or milliseconds to three digits where that would say little."""
    value = float(text)
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def documents() -> list[Path]:
    """The documents that show tables of rows; an installed package has none."""
    if not IN_CHECKOUT:
        return []
    pages = sorted(page for page in (_HERE.parent / "docs").glob("*.md") if "<!-- rows: " in page.read_text())
    return [_HERE / "README.md", _HERE.parent / "README.md", *pages]


def refresh(document: Path) -> str:
    """The text of a Markdown document with the tables and pictures between its markers made anew."""
    text = document.read_text()
    pattern = re.compile(r"(<!-- (rows|picture): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    shown: dict[str, Callable[[str], str]] = {"rows": _shown, "picture": partial(_picture, document)}
    return pattern.sub(lambda m: m[1] + shown[m[2]](m[3]) + m[4], text)


def _picture(document: Path, name: str) -> str:
    file = RESULTS / f"{name}.png"
    return f"![{name}]({os.path.relpath(file, document.parent)})\n" if file.exists() else ""


def _shown(name: str) -> str:
    """The text between two markers: a table of a file's rows, of whole or large jobs, of the toy, or of support."""
    if name == "support":
        return support.markdown()
    if name == "in_short":
        return in_short.sentences(read("pipeline"), read("peers"))
    if name == "large":
        found = [row for row in by_size(read("pipeline")) if row["stages"] and "70b" in row["shape"]]
        return markdown(found, left_out=("rank", "adapters", "spread"))
    if name == "jobs":
        return markdown(whole_jobs(read("pipeline")), left_out=("rank", "adapters", "spread"))
    if name not in ("toy", "toy_findings", "toy_tuned", "real"):
        return markdown(by_size(read(name)))
    if not (file := RESULTS / f"{name.partition('_')[0]}.csv").exists():
        return ""
    if name == "real":
        return real_table.markdown(real_table.read(file))
    rows = table.read(file)
    if name == "toy_tuned":
        return tuned.markdown(rows)
    return table.markdown(rows) if name == "toy" else "".join(f"- {sentence}\n" for sentence in table.findings(rows))
