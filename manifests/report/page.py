"""The whole page: head, index and a section for each output. It holds no script and refers to nothing outside."""

from collections.abc import Iterable
from importlib.resources import files
from xml.etree.ElementTree import Element, tostring

from safeshard.manifests.report.markup import Child, table, tag
from safeshard.manifests.report.sections import counts_text, section
from safeshard.manifests.schema import Manifest
from safeshard.manifests.sizes import human

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(outputs: Iterable[tuple[str, Manifest]]) -> str:
    """HTML about outputs, each given by a title and its manifest; of several, an index comes first.

    Manifests are taken one at a time. Of each only so many rows and cells are shown, whatever its size.
    """
    sections: list[Element] = []
    titles: list[str] = []
    rows: list[list[Child]] = []
    for title, manifest in outputs:
        anchor = f"output-{len(sections) + 1}"
        titles.append(title)
        sections.append(section(title, manifest, anchor))
        rows.append(_index_row(title, manifest, anchor))
    name = titles[0] if len(titles) == 1 else f"{len(titles)} outputs"
    index = [] if len(titles) == 1 else [tag("section", tag("h1", name), _index(rows))]
    body = tag("body", tag("p", "safeshard report", class_="brand"), *index, *sections)
    document = tag("html", _head(f"safeshard: {name}"), body, lang="en")
    return f"<!DOCTYPE html>\n{tostring(document, encoding='unicode', method='html')}\n"


def _head(title: str) -> Element:
    style = Element("style")
    style.text = files("safeshard.manifests.report").joinpath("style.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        style,
    )


def _index_row(title: str, manifest: Manifest, anchor: str) -> list[Child]:
    return [
        tag("a", title, href=f"#{anchor}"),
        manifest.method.name,
        counts_text(manifest.modules),
        len(manifest.fallbacks),
        human(manifest.run.bytes_read),
        f"{manifest.run.wall_s:.2f} s",
    ]


def _index(rows: list[list[Child]]) -> Element:
    head = ["output", "method", "decisions", "fallbacks", "read", "time"]
    return table(head, rows, lambda row: row, numeric=["fallbacks", "read", "time"])
