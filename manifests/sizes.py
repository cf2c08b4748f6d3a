"""Counts of bytes as people read them."""

from __future__ import annotations


def human(nbytes: float) -> str:
    """Decimal units, three digits or more: 1500 -> '1.50 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
