"""The few figures that the README shows, as sentences from the rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

Rows = Sequence[dict[str, str]]


def sentences(pipeline: Rows, peers: Rows) -> str:
    """Whole jobs of 1.1B and 70B shape, and a merge beside mergekit's.

    Args:
        pipeline, peers: the newest row of each measurement.
    """
    shapes = ("llama-1b x22 layers", "llama-70b x80 layers", "llama-70b x10 layers")
    small, large, cut = (_row(pipeline, "safemerge, 1 adapter", shape) for shape in shapes)
    merge = next((row for row in peers if row["against"].startswith("mergekit")), None)
    if small is None or large is None or cut is None or merge is None:
        return "Not all of these were measured yet.\n"
    whole, peer = float(large["bytes"]) / 1e9, merge["against"].partition(" ")[0]
    times, share = float(merge["time_ratio"]), 100 * float(merge["memory_ratio"])
    said = [
        f"SafeMERGE of a rank-16 adapter takes {_seconds(small):.1f} s and {_gigabytes(small):.2f} GB on a 1.1B shape;",
        f"{_seconds(large):.0f} s and {_gigabytes(large):.1f} GB on a 70B shape ({whole:.0f} GB read and written,",
        f"not cached), where 10 of its 80 layers take {_gigabytes(cut):.1f} GB.",
        f"Merging two 1.1B checkpoints takes 1/{times:.1f} of {peer}'s time and {share:.0f} % of its memory.",
    ]
    return textwrap.fill(" ".join(said), 120) + "\n"


def _row(rows: Rows, what: str, shape: str) -> dict[str, str] | None:
    """The row of a shape; where some of its layers repeat others' data the shape says so at its end."""
    found = [row for row in rows if row["what"] == what and row["shape"].split(",")[0] == shape]
    return next((row for row in found if row["cache"] == "warm"), found[0] if found else None)


def _gigabytes(row: dict[str, str]) -> float:
    return float(row["peak_rss_bytes"]) / 1e9


def _seconds(row: dict[str, str]) -> float:
    return float(row["median_s"])
