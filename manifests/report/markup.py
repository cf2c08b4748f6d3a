"""Elements of the page, on xml.etree: what enters is the text of an element or of a quoted attribute, never markup.

Names come from files that others wrote; every text passes `printable`, which also bounds its length.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar
from xml.etree.ElementTree import Element

from safeshard.manifests.errors import printable

T = TypeVar("T")
MAX_ROWS = 1000

Child = Element | str | int | float | None


def tag(kind: str, /, *children: Child, **attributes: Child) -> Element:
    """An element. None is left out, of children and of attributes; `class_` is class, `text_anchor` text-anchor."""
    given = {key.rstrip("_").replace("_", "-"): printable(v) for key, v in attributes.items() if v is not None}
    element = Element(kind, given)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + printable(child)
        elif child is not None:
            element.text = (element.text or "") + printable(child)
    return element


def table(
    head: Sequence[str], items: Sequence[T], row: Callable[[T], Sequence[Child]], numeric: Sequence[str] = ()
) -> Element:
    """A table with a row for each of the first `MAX_ROWS` items, and a line that counts those left out.

    Columns that `numeric` names are set to the right.
    """
    classes = ["number" if name in numeric else None for name in head]
    rows = [
        tag("tr", *(tag("td", cell, class_=c) for cell, c in zip(row(item), classes, strict=True)))
        for item in items[:MAX_ROWS]
    ]
    if len(items) > MAX_ROWS:
        rows.append(tag("tr", tag("td", f"and {len(items) - MAX_ROWS} more, in manifest.json", colspan=len(head))))
    heads = (tag("th", name, class_=c, scope="col") for name, c in zip(head, classes, strict=True))
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows)), class_="wide")


def facts(pairs: Sequence[tuple[str, Child]]) -> Element:
    """A table of two columns without a head: what, and its value."""
    shown = [tag("tr", tag("th", label, scope="row"), tag("td", value)) for label, value in pairs[:MAX_ROWS]]
    if len(pairs) > MAX_ROWS:
        shown.append(tag("tr", tag("td", f"and {len(pairs) - MAX_ROWS} more, in manifest.json", colspan=2)))
    return tag("div", tag("table", tag("tbody", *shown), class_="facts"), class_="wide")


def folded(summary: str, *content: Child) -> Element:
    """Content that a click unfolds."""
    return tag("details", tag("summary", summary), *content)


def bar(share: float) -> Element:
    """A horizontal bar, filled to `share` of its length."""
    filled = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    return tag(
        "svg",
        tag("rect", width=100, height=10, class_="track"),
        tag("rect", width=filled, height=10, class_="fill"),
        class_="bar", viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true",
    )  # fmt: skip
