"""Pictures as data: marks on a frame with two axes of round ticks, which one template draws as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, log10

from safeshard.manifests.report.markup import Table

WIDTH, LEFT, RIGHT = 720, 68, 20
BOUND = 1e30  # of what is drawn: the difference of two floats may be infinite
DECADES = 100.0  # a range from which on an axis is logarithmic


@dataclass(frozen=True)
class Axis:
    """Values `low` to `high` on pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # of counts: no ticks between

    def at(self, value: float) -> float:
        """Where a value lies, in pixels to a tenth."""
        low, high, value = (self._place(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def _place(self, value: float) -> float:
        return log10(value) if self.log else value

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and texts of round values."""
        values = _decades(self.low, self.high) if self.log else round_values(self.low, self.high, whole=self.whole)
        return [(self.at(value), text) for value, text in values]


@dataclass(frozen=True)
class Mark:
    """One SVG element of a picture: `class_` is for the style, `title` what a pointer or a reader is told."""

    kind: str
    place: Mapping[str, float | str]
    class_: str
    title: str = ""
    text: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawing of `height` pixels; `title` and `text` say in words what it shows, `numbers` all of it."""

    title: str
    text: str
    x: Axis
    y: Axis
    x_name: str
    y_name: str
    height: int
    marks: Sequence[Mark] = field(default_factory=tuple)
    numbers: Table | None = None
    width: int = WIDTH


def axis_of(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis that holds all values, with some room; logarithmic where they are positive and far apart."""
    known = [min(max(value, -BOUND), BOUND) for value in values]
    low, high = min(known), max(known)
    if low > 0 and high / low >= DECADES:
        return Axis(low / 1.2, high * 1.2, start, end, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
    return Axis(0.0 if 0 <= low < high - low else low - room, high + room, start, end)


def round_values(low: float, high: float, most: int = 7, *, whole: bool = False) -> list[tuple[float, str]]:
    """At most `most` multiples of 1, 2, 2.5 or 5 times a power of ten, with just the digits that tell them apart."""
    rough = max((high - low) / (most - 1), 1.0 if whole else 0.0)
    power = 10.0 ** floor(log10(rough))
    step = next(
        factor * power
        for factor in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10))
        if factor * power >= rough * (1 - 1e-9)
    )
    digits = next((d for d in range(12) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 12)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    values = [number * step for number in range(first, last + 1)]
    large = max(abs(low), abs(high)) >= 1e5
    return [(value, f"{value:.3g}" if large else f"{value:.{digits}f}") for value in values]


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    first, last = ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9)
    step = max(1, ceil((last - first) / 6))
    return [(10.0**power, f"{10.0**power:g}") for power in range(first, last + 1, step)]
