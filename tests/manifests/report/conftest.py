"""A page read back with the standard library's HTML parser."""

from collections.abc import Callable
from html.parser import HTMLParser

import pytest

Attributes = dict[str, str | None]
VOID = {"meta", "br"}


class Read(HTMLParser):
    """Elements as (name, attributes, text) in the order of their ends; refuses what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Attributes, str]] = []
        self.open: list[tuple[str, Attributes, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        name, attributes, text = self.open.pop()
        assert name == tag
        self.elements.append((name, attributes, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def named(self, name: str, class_: str | None = None) -> list[tuple[Attributes, str]]:
        """Attributes and text of the elements of a name, and of a class."""
        found = [(attributes, text) for tag, attributes, text in self.elements if tag == name]
        return [e for e in found if class_ is None or class_ in (e[0].get("class") or "").split()]

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Names of all elements and of their attributes."""
        return [(name, tuple(attributes)) for name, attributes, _ in self.elements]


@pytest.fixture
def read() -> Callable[[str], Read]:
    return Read
