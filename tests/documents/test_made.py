"""What documents say about options and the manifest is made from the code; the site has a place for every page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import reference
from fences import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs"))
import publish

from safeshard.bench.pages.documents import documents as documents_of_rows
from safeshard.streamer.methods import METHODS


@pytest.mark.parametrize("document", reference.documents(), ids=lambda page: page.stem)
def test_tables_are_made_from_the_code(document: Path) -> None:
    assert reference.refresh(document) == document.read_text(), "run `python tests/documents/reference.py`"


def test_every_method_has_a_page_with_its_options() -> None:
    for method in METHODS:
        page = (ROOT / f"docs/{method}.md").read_text()
        assert f"<!-- made: options {method} -->" in page
        assert f"safeshard {method} " in page
        assert re.search(r"ifferences? from|published code", page)
    assert all(option in METHODS[method].model_fields for method, option in reference.PAPERS)


def test_tables_of_numbers_stand_in_documents_that_make_them_from_rows() -> None:
    """A table with seconds or bytes of a run comes from rows, or says that it was measured once, or what it is of."""
    made = re.compile(r"<!-- (?:rows|made): .*?<!-- end -->", re.DOTALL)
    allowed = {"docs/limits.md", "docs/reproduce.md", "docs/evaluation.md"}  # worst cases; others' figures; settings
    for page in PAGES:
        rest = made.sub("", page.read_text())
        tables = re.findall(r"^\|.*\d (?:s|ms|[GM]B|GB/s) \|.*$", rest, re.MULTILINE)
        assert not tables or str(page.relative_to(ROOT)) in allowed, f"{page}: {tables[0]}"
    assert len(documents_of_rows()) >= 5


def test_every_page_is_in_the_menu_and_every_entry_is_a_page() -> None:
    pages = {place for place in publish.published().values() if place.endswith(".md")}
    shown = re.findall(r"[\w./-]+\.md", str(publish.configuration(pages)["nav"]))
    assert sorted(shown) == sorted(pages)
    assert set(publish.published()) >= {
        "examples/defend.ipynb",
        "streamer/plan/jobs.schema.json",
        "bench/results/toy.png",
    }


def test_links_lead_to_what_is_published() -> None:
    site = publish.published()
    for source, place in site.items():
        if place.endswith(".md"):
            publish.staged(source, site)


def test_a_dead_link_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[here](#a) [web](https://x.org) [there](page.md#b) [dead](none.md)")
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    with pytest.raises(publish.DeadLinkError, match=r"page\.md: none\.md"):
        publish.staged("page.md", {"page.md": "page.md"})
    (tmp_path / "none.md").touch()
    with pytest.raises(publish.DeadLinkError, match="not published"):
        publish.staged("page.md", {"page.md": "page.md"})
    moved = publish.staged("page.md", {"page.md": "a/index.md", "none.md": "b.md"})
    assert moved == "[here](#a) [web](https://x.org) [there](index.md#b) [dead](../b.md)"


def test_a_block_that_is_not_run_says_so_on_the_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```sh not run: needs a GPU\nx\n```\n")
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    shown = publish.staged("page.md", {"page.md": "page.md"})
    assert shown == "*Not run by the tests: needs a GPU.*\n\n```sh\nx\n```\n"


def test_the_readme_of_a_distribution_has_absolute_links() -> None:
    text = publish.absolute("https://host/org/name", "v9")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(target.startswith("https://") for target in targets)
    assert "https://host/org/name/raw/v9/bench/results/toy.png" in targets
    assert "https://host/org/name/blob/v9/docs/start.md" in targets


def test_the_readme_is_drawn_by_what_draws_it_on_pypi() -> None:
    drawn = pytest.importorskip("readme_renderer.markdown").render(publish.absolute("https://host/org/name", "v9"))
    assert drawn is not None
    assert drawn.count("<img") == 3
    assert drawn.count("<table") == 3
    assert "not run:" not in re.sub(r"<[^>]*>", "", drawn)
