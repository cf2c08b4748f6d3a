"""Documents that show rows: their tables, sentences and pictures are made of bench/results, between markers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from safeshard.bench import rows
from safeshard.bench.inputs import support
from safeshard.bench.pages import in_short
from safeshard.bench.real import table as real_table
from safeshard.bench.toy import table, tuned

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
    "processor a GB": lambda row: _processor_a_gb(row),
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


def _processor_a_gb(row: dict[str, str]) -> str:
    seconds, nbytes = _stage(row, "processor"), float(row["bytes"] or 0)
    return f"{float(seconds) / nbytes * 1e9:.2g} s" if seconds and nbytes else ""


def _seconds(text: str) -> str:
    """Seconds to two decimals, or milliseconds to three digits where that would say little."""
    value = float(text)
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def documents() -> list[Path]:
    """The documents that show tables of rows; an installed package has none."""
    if not rows.IN_CHECKOUT:
        return []
    pages = sorted(page for page in (rows.HERE.parent / "docs").glob("*.md") if "<!-- rows: " in page.read_text())
    return [rows.HERE / "README.md", rows.HERE.parent / "README.md", *pages]


def refresh(document: Path) -> str:
    """The text of a Markdown document with the tables and pictures between its markers made anew."""
    text = document.read_text()
    pattern = re.compile(r"(<!-- (rows|picture): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    shown: dict[str, Callable[[str], str]] = {"rows": _shown, "picture": partial(_picture, document)}
    return pattern.sub(lambda m: m[1] + shown[m[2]](m[3]) + m[4], text)


def _picture(document: Path, name: str) -> str:
    file = rows.RESULTS / f"{name}.png"
    return f"![{name}]({os.path.relpath(file, document.parent)})\n" if file.exists() else ""


def _shown(name: str) -> str:
    """The text between two markers: a table of a file's rows, of whole or large jobs, of the toy, or of support."""
    if name == "support":
        return support.markdown()
    if name == "in_short":
        return in_short.sentences(rows.read("pipeline"), rows.read("peers"))
    if name == "large":
        found = [row for row in rows.by_size(rows.read("pipeline")) if row["stages"] and "70b" in row["shape"]]
        return markdown(found, left_out=("rank", "adapters", "spread"))
    if name == "jobs":
        return markdown(rows.whole_jobs(rows.read("pipeline")), left_out=("rank", "adapters", "spread"))
    if name not in ("toy", "toy_findings", "toy_tuned", "real"):
        return markdown(rows.by_size(rows.read(name)))
    if not (file := rows.RESULTS / f"{name.partition('_')[0]}.csv").exists():
        return ""
    if name == "real":
        return real_table.markdown(real_table.read(file))
    toys = table.read(file)
    if name == "toy_tuned":
        return tuned.markdown(toys)
    return table.markdown(toys) if name == "toy" else "".join(f"- {sentence}\n" for sentence in table.findings(toys))
