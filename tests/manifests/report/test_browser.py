"""The page in a headless Chromium: on a screen, on a telephone, in the dark, by keyboard, printed, for a screen reader.

Skipped where there is no browser: `apt-get install chromium` and `pip install 'safeshard[browser]'` bring them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_pages import evaluated, gated, ridge

from safeshard.manifests import Manifest
from safeshard.manifests.report import page

BINARIES = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = {
    "screen": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "telephone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}
A4 = {"width": 688, "height": 1000}  # pixels of a sheet between its margins
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skip that says what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'safeshard[browser]'")
    binary = os.environ.get("SAFESHARD_CHROMIUM") or next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip("needs a Chromium on the path, or named by SAFESHARD_CHROMIUM")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def file(tmp_path: Path, example: Manifest) -> Path:
    """A page on three outputs with an evaluation, one of them hostile."""
    outputs = {"merged": gated(example), "ridge": ridge(example), '"><script>alert(1)</script>': ridge(example, 3, 0.1)}
    place = tmp_path / "page.html"
    place.write_text(page(outputs.items(), [evaluated(outputs)]))
    return place


class Opened:
    """A page that is open, and all that went wrong on it."""

    def __init__(self, browser: Any, file: Path, view: str) -> None:
        self.context = browser.new_context(**VIEWS[view])
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("dialog", lambda dialog: self.wrong.append("a dialog"))
        self.page.on("request", lambda r: r.url == file.as_uri() or self.wrong.append(r.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.wrong == []


@pytest.mark.parametrize("view", VIEWS)
def test_it_loads_nothing_fits_and_axe_finds_no_violation(browser: Any, file: Path, view: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    with Opened(browser, file, view) as opened:
        assert opened.evaluate("document.querySelectorAll('script').length") == 0
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
        opened.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        found = axe.Axe().run(opened)
    assert [(v["id"], v["nodes"][0]["html"]) for v in found.response["violations"]] == []


def test_a_shade_shows_on_a_telephone_that_a_table_goes_on(browser: Any, file: Path) -> None:
    """At the right edge, light and dark, until the last column is in sight; not on paper."""
    with Opened(browser, file, "telephone") as opened:
        table = opened.locator(".wide").first
        assert table.evaluate("e => e.scrollWidth > e.clientWidth + 100")
        for scheme in ("light", "dark"):
            opened.emulate_media(color_scheme=scheme)
            box = table.bounding_box()
            strip = {"x": box["x"] + box["width"] - 4, "y": box["y"] + box["height"] - 6, "width": 3, "height": 3}
            table.evaluate("e => e.scrollLeft = 0")
            before = opened.screenshot(clip=strip)
            table.evaluate("e => e.scrollLeft = e.scrollWidth")
            assert opened.screenshot(clip=strip) != before
        opened.emulate_media(media="print")
        assert table.evaluate("e => getComputedStyle(e).backgroundImage") == "none"


def test_paper_has_every_column_and_what_is_folded(browser: Any, file: Path) -> None:
    with Opened(browser, file, "screen") as opened:
        opened.set_viewport_size(A4)
        opened.emulate_media(media="print")
        cells = opened.evaluate(
            "[...document.querySelectorAll('th, td')].filter(e => e.textContent && e.checkVisibility())"
            ".map(e => [e.textContent, e.getBoundingClientRect().right])"
        )
        hidden = "[...document.querySelectorAll('details td:not(:empty)')].filter(e => !e.checkVisibility()).length"
        assert opened.evaluate(hidden) == 0
        assert opened.pdf(format="A4")[:5] == b"%PDF-"
    assert len(cells) > 500
    assert [cell for cell in cells if cell[1] > A4["width"] + 0.5] == []


def test_any_two_maps_stand_side_by_side(browser: Any, file: Path) -> None:
    def shown() -> list[str]:
        places = opened.eval_on_selector_all(
            ".choice", "all => all.filter(e => e.offsetParent).map(e => [e.getBoundingClientRect().left, e.id])"
        )
        return [name for _, name in sorted(places)]

    with Opened(browser, file, "screen") as opened:
        assert shown() == ["maps-1", "maps-2"]
        opened.select_option("#right", index=2)
        assert shown() == ["maps-1", "maps-3"]
        opened.select_option("#left", index=2)
        opened.select_option("#right", index=1)
        assert shown() == ["maps-3", "maps-2"]


def test_the_keyboard_reaches_everything(browser: Any, file: Path) -> None:
    with Opened(browser, file, "telephone") as opened:
        stops = opened.evaluate(
            "[...document.querySelectorAll('a, select, summary, [tabindex]')].filter(e => e.checkVisibility()).length"
        )
        reached = []
        for _ in range(stops):
            opened.keyboard.press("Tab")
            reached.append(opened.evaluate("[document.activeElement.tagName, document.activeElement.className]"))
        scrolls = opened.evaluate(
            "[...document.querySelectorAll('.wide')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0).length"
        )
    assert reached[0] == ["A", "skip"]
    assert "BODY" not in [tag for tag, _ in reached]
    assert {"A", "SELECT", "SUMMARY", "DIV"} <= {tag for tag, _ in reached}
    assert scrolls == 0


def test_heads_stay_in_sight(browser: Any, tmp_path: Path, example: Manifest) -> None:
    file = tmp_path / "long.html"
    file.write_text(page([("out", gated(example, 60))]))
    with Opened(browser, file, "screen") as opened:
        opened.evaluate("document.querySelectorAll('.heat tbody tr')[50].scrollIntoView({block: 'center'})")
        top = opened.evaluate("document.querySelector('.heat thead th').getBoundingClientRect().top")
        assert 0 <= top < 100
