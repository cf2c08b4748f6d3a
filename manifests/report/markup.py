"""The templates of the page, and what goes into them: text, which is escaped, and the few elements made here.

Names come from files that others wrote. Every value passes `printable`, which also bounds its length, and then jinja2's
escaping; no template marks anything as safe, and every attribute stands in quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any, TypeVar

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from safeshard.manifests.errors import printable

T = TypeVar("T")
MAX_ROWS = 1000
WIDE = 6  # columns that a printed page holds; of a table with more each row is printed as a card
Child = str | int | float | Markup | None


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row names it. `numeric` columns are set to the right."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Child]]
    numeric: frozenset[str] = frozenset()
    left_out: int = 0

    @property
    def wide(self) -> bool:
        """Whether it is wider than a printed page."""
        return len(self.head) > WIDE

    @property
    def scrolls(self) -> bool:
        """Whether it may be wider than a telephone; what scrolls is a tab stop."""
        return len(self.head) > 3


def table(
    label: str,
    head: Sequence[str],
    items: Sequence[T],
    row: Callable[[T], Sequence[Child]],
    numeric: Sequence[str] = (),
) -> Table:
    """A table with a row for each of the first `MAX_ROWS` items, and a line that counts those left out."""
    rows = [row(item) for item in islice(items, MAX_ROWS)]
    return Table(label, head, rows, frozenset(numeric), max(0, len(items) - MAX_ROWS))


def code(text: object) -> Markup:
    """A hash, an option or a place, in the type of code."""
    return Markup("<code>{}</code>").format(printable(text))


def link(text: object, href: str) -> Markup:
    """A link; whoever gives `href` answers for it."""
    return Markup('<a href="{}" rel="noreferrer">{}</a>').format(printable(href), printable(text))


def bar(share: float, class_: str = "fill") -> Markup:
    """A horizontal bar, filled to `share` of its length; a number beside it says the same."""
    filled = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="10"/><rect class="{}" width="{}" height="10"/></svg>'
    ).format(class_, filled)


def rendered(template: str, **values: Any) -> Markup:
    """A template with values in it."""
    return Markup(_environment().get_template(template).render(values))


def _source(name: str) -> str:
    return files("safeshard.manifests.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> object:
    return value if isinstance(value, Markup) else "" if value is None else printable(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True, finalize=_text, loader=FunctionLoader(_source), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["style"] = Markup(_source("style.css"))
    return environment
