"""The heat map and the histogram, read back from the page and compared with the values they show."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from safeshard.manifests import Manifest, ModuleEntry
from safeshard.manifests.report import page
from safeshard.manifests.report.heatmap import Scale
from safeshard.manifests.schema import Decision

Reader = Callable[[str], Any]
LOOKS: dict[Decision, str] = {
    "kept": "·", "merged": "●", "projected": "▼", "selected": "◆", "scaled": "◇", "reverted": "○",
}  # fmt: skip


def with_modules(example: Manifest, modules: list[ModuleEntry]) -> Manifest:
    return example.model_copy(update={"modules": tuple(modules)})


@pytest.mark.parametrize("decision", LOOKS)
def test_a_cell_shows_value_and_decision(example: Manifest, read: Reader, decision: Decision) -> None:
    module = ModuleEntry(name="layers.7.mlp.up", decision=decision, cosine=-0.25, note="a note")
    [(attributes, text)] = read(page([("out", with_modules(example, [module]))])).named("td", decision)
    assert text == f"-0.250 {LOOKS[decision]}"
    assert attributes["title"].startswith("layers.7.mlp.up: -0.25, ")
    assert "a note" in attributes["title"]


def test_a_share_is_shown_where_there_is_one(example: Manifest, read: Reader) -> None:
    module = ModuleEntry(name="layers.0.q", decision="selected", selected_fraction=0.125)
    found = read(page([("out", with_modules(example, [module]))]))
    assert [text for _, text in found.named("td", "selected")] == ["12.5% ◆"]
    assert "share of entries kept" in found.named("p", "legend")[0][1]


def test_nearness_is_marked_by_sign_and_frame(example: Manifest, read: Reader) -> None:
    near = [m for m in example.modules if m.near_threshold]
    found = read(page([("out", example)]))
    cells = found.named("td", "near")
    assert [a["title"].partition(":")[0] for a, _ in cells] == [m.name for m in near] != []
    assert all("~" in text for _, text in cells)
    assert "~ within 1e-5 of the threshold" in found.named("p", "legend")[0][1]


def test_the_lowest_value_has_the_deepest_shade() -> None:
    scale = Scale(0.2, 0.6)
    assert [scale.shade(v) for v in (0.2, 0.2499, 0.2501, 0.4001, 0.5999, 0.6)] == [7, 7, 6, 3, 0, 0]
    assert Scale(0.3, 0.3).shade(0.3) == 4
    assert Scale(-1.0, 1.0).shade(1e308) == 0


def test_a_layer_without_a_module_has_an_empty_cell(example: Manifest, read: Reader) -> None:
    names = ["layers.0.q", "layers.0.k", "layers.1.q"]
    found = read(page([("out", with_modules(example, [ModuleEntry(name=n, decision="kept") for n in names]))]))
    assert [text for _, text in found.named("td", "none")] == [""]


def bars(found: Any, kind: str) -> list[tuple[int, float, float]]:
    """Count and bounds of a histogram's bars."""
    titles = [text for _, text in found.named("title")]
    matches = [re.fullmatch(rf"(\d+) {kind}, (-?[\d.]+) to (-?[\d.]+)", text) for text in titles]
    return [(int(m[1]), float(m[2]), float(m[3])) for m in matches if m]


@pytest.mark.parametrize("threshold", [0.35, 0.05, 0.949, None])
def test_bars_count_the_modules(example: Manifest, read: Reader, threshold: float | None) -> None:
    cosines = [0.0512 + 0.9 * ((37 * i) % 101) / 101 for i in range(101)]
    modules = [
        ModuleEntry(
            name=f"layers.{i}.q",
            decision="kept" if threshold is None or c >= threshold else "merged",
            cosine=c,
            threshold=threshold,
        )
        for i, c in enumerate(cosines)
    ]
    found = read(page([("out", with_modules(example, modules))]))
    treated, kept = bars(found, "treated"), bars(found, "kept")
    assert sum(n for n, _, _ in treated) == sum(m.decision == "merged" for m in modules)
    assert sum(n for n, _, _ in kept) == sum(m.decision == "kept" for m in modules)
    for count, low, high in treated + kept:
        assert sum(low - 1e-4 <= c < high + 1e-4 for c in cosines) >= count
        assert sum(low + 1e-4 <= c < high - 1e-4 for c in cosines) <= count
    if threshold is not None:
        assert all(high <= threshold + 1e-4 for _, _, high in treated)
        assert all(low >= threshold - 1e-4 for _, low, _ in kept)
        assert f"threshold {threshold:.6g}" in [text for _, text in found.named("text", "threshold")]


def test_heights_are_to_scale(example: Manifest, read: Reader) -> None:
    cosines = [0.1] * 3 + [0.9] * 6
    modules = [ModuleEntry(name=f"layers.{i}.q", decision="kept", cosine=c) for i, c in enumerate(cosines)]
    found = read(page([("out", with_modules(example, modules))]))
    low, high = (float(a["height"]) for a, _ in found.named("rect", "kept"))
    assert high == pytest.approx(2 * low, abs=0.2)


def test_without_values_there_is_no_histogram(example: Manifest, read: Reader) -> None:
    found = read(page([("out", with_modules(example, [ModuleEntry(name="layers.0.q", decision="scaled")]))]))
    assert [a for a, _ in found.named("svg") if a.get("role") == "img"] == []
    assert [text for _, text in found.named("td", "scaled")] == ["◇"]
