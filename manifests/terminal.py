"""Tables and bars for a terminal, by rich; the same text without colours where it goes elsewhere.

Texts come from files that others wrote: they pass `printable`, and rich reads no markup in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from safeshard.manifests.errors import printable

if TYPE_CHECKING:  # rich takes a tenth of a second, which commands without a table need not wait
    from rich.bar import Bar
    from rich.text import Text

BAR = 30  # columns of a bar
UNBOUNDED = 100_000  # columns: what is too wide was cut into tables before it comes here, and is never wrapped


class Painted(NamedTuple):
    """A cell in a style of rich's, such as "yellow"."""

    text: str
    style: str


class Span(NamedTuple):
    """A cell that is a bar from `begin` to `end` of the range 0 to 1."""

    begin: float
    end: float
    style: str = ""


def grid(
    heads: Sequence[str], rows: Iterable[Sequence[str | Painted | Span]], color: bool = False, left: int = 1
) -> str:
    """Rows in columns, under heads if there are any: the first `left` columns to the left, others to the right."""
    from rich.console import Console
    from rich.table import Table

    cells = [[*map(_cell, row)] for row in rows]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_header=bool(heads))
    for number, head in enumerate(heads or [""] * max(map(len, cells), default=0)):
        table.add_column(_cell(head), justify="left" if number < left else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    text = StringIO()
    console = Console(
        file=text, width=UNBOUNDED, color_system="standard" if color else None, force_terminal=color, highlight=False,
        legacy_windows=False,
    )  # fmt: skip
    console.print(table, crop=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def layer_bars(layers: Mapping[str, Sequence[float]], name: str, color: bool = False) -> str:
    """Of each layer lowest, median and highest value, and a bar from lowest to highest on the range of all."""
    values = [value for each in layers.values() for value in each]
    if not values:
        return f"no {name} is known"
    low, width = min(values), max(values) - min(values)
    width = width or 1.0
    rows: list[list[str | Painted | Span]] = []
    for layer, each in layers.items():
        first, middle, last = min(each), median(each), max(each)
        span = Span((first - low) / width, max((last - low) / width, (first - low) / width + 1 / BAR), "cyan")
        rows.append([layer, f"{first:.4f}", f"{middle:.4f}", f"{last:.4f}", span])
    return grid(["layer", "lowest", "median", "highest", f"{name} {low:.4f} to {low + width:.4f}"], rows, color)


def has_colour(stream: object) -> bool:
    """Whether to paint, as rich finds: a terminal that can, and nobody who minds (https://no-color.org)."""
    from rich.console import Console

    console = Console(file=stream)  # type: ignore[arg-type]
    return console.color_system is not None and not console.no_color


def _cell(cell: str | Painted | Span) -> Text | Bar:
    from rich.bar import Bar
    from rich.text import Text

    if isinstance(cell, Span):
        return Bar(1.0, cell.begin, cell.end, width=BAR, color=cell.style or "default")
    text, style = cell if isinstance(cell, Painted) else (cell, "")
    return Text(printable(text), style=style)
