"""The map of experts' tokens, read back from the page."""

from collections.abc import Callable
from typing import Any

from safeshard.manifests import Manifest, ModuleEntry
from safeshard.manifests.report import page
from safeshard.manifests.report.heatmap import MAX_CELLS

Reader = Callable[[str], Any]


def shown(example: Manifest, read: Reader, modules: list[ModuleEntry]) -> Any:
    return read(page([("out", example.model_copy(update={"modules": tuple(modules)}))]))


def entry(layer: int, expert: int, role: str, **fields: Any) -> ModuleEntry:
    return ModuleEntry(name=f"model.layers.{layer}.mlp.experts.{expert}.{role}", decision="shrunk", **fields)


def test_every_expert_has_a_cell_and_those_with_few_tokens_are_marked(example: Manifest, read: Reader) -> None:
    counts = {(0, 0): 120, (0, 1): 7, (1, 0): 0, (1, 1): 64}
    modules = [
        entry(layer, expert, role, tokens=n, shared_gram=(1 - n / 10) if n < 10 and role == "up_proj" else None)
        for (layer, expert), n in counts.items()
        for role in ("up_proj", "down_proj")
    ]
    found = shown(example, read, modules)
    cells = [
        (a["title"], text, "near" in a["class"]) for a, text in found.named("td") if "tokens" in a.get("title", "")
    ]
    assert cells == [
        ("model.layers.0.mlp.experts.0: 120 tokens", "120", False),
        ("model.layers.0.mlp.experts.1: 7 tokens, 30% of its Gram is that of all tokens", "7", True),
        ("model.layers.1.mlp.experts.0: 0 tokens, 100% of its Gram is that of all tokens", "0", True),
        ("model.layers.1.mlp.experts.1: 64 tokens", "64", False),
    ]
    [line] = [text for _, text in found.named("p") if text.startswith("4 experts")]
    assert line.startswith("4 experts in 2 layers, 0 to 120 tokens each; 2 have too few, 1 of them none")


def test_nothing_is_shown_of_models_without_experts(example: Manifest, read: Reader) -> None:
    found = shown(example, read, [ModuleEntry(name="model.layers.0.mlp.up_proj", decision="shrunk")])
    assert not any("expert" in text for _, text in found.named("h3"))


def test_too_many_cells_leave_the_line_alone(example: Manifest, read: Reader) -> None:
    found = shown(example, read, [entry(0, expert, "up_proj", tokens=9) for expert in range(MAX_CELLS)])
    assert not [a for a, _ in found.named("td") if "9 tokens" in (a.get("title") or "")]
    assert any(f"{MAX_CELLS} experts in 1 layers" in text for _, text in found.named("p"))
