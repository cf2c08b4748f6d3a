"""Settings are chosen on validation alone."""

from __future__ import annotations

from safeshard.bench.toy import table


def row(method: str, setting: str, split: str, harm: float, task: float, seed: int = 0) -> dict[str, str]:
    figures = {"harm": harm, "refusal": 100 - harm, "harmless": 100, "task": task}
    return {"seed": str(seed), "model": "m", "method": method, "setting": setting, "split": split} | {
        key: str(value) for key, value in figures.items()
    }


def test_the_best_task_among_the_safe_settings_on_validation() -> None:
    rows = [
        row("aligned", "", "validation", 2, 0) | {"model": "aligned"},
        row("scale", "low", "validation", 2, 10), row("scale", "low", "test", 50, 0),
        row("scale", "mid", "validation", 10, 30), row("scale", "mid", "test", 90, 0),
        row("scale", "high", "validation", 10.1, 90), row("scale", "high", "test", 0, 100),
        row("other", "a", "validation", 60, 90), row("other", "b", "validation", 50, 10),
    ]  # fmt: skip
    picked = {key: found for key, found in table.chosen(rows).items() if key[0] == "m"}
    assert picked == {("m", "scale"): ("m", "scale", "mid"), ("m", "other"): ("m", "other", "b")}


def test_means_and_ranges_over_seeds() -> None:
    rows = [
        row("scale", "x", split, harm, 40, seed) for split in ("validation", "test") for seed, harm in ((0, 0), (1, 9))
    ]
    assert "| m | scale | x | 4 (0-9) | 96 (91-100) | 100 (100-100) | 40 (40-40) |" in table.markdown(rows)


def experiment(half: float, projected: float) -> list[dict[str, str]]:
    """Rows of `scale` with task = harm, against SafeLoRA and a gate of which the task is given."""
    figures = [
        ("aligned", "aligned", "", 0, 0), ("dirty-lora", "fine-tuned", "", 100, 100),
        ("dirty-lora", "scale", "factor 0.5", 50, 50), ("dirty-lora", "SafeLoRA", "7 modules", 40, projected),
        ("dirty-lora", "SafeMERGE", "weights 0.8/0.2", 60, 90), ("dirty-lora", "SafeMERGE", "weights 0.6/0.4", 5, 70),
        ("dirty-lora", "SafeMERGE, half gated", "weights 0.8/0.2", 70, half),
    ]  # fmt: skip
    return [
        row(method, setting, split, harm, task) | {"model": model}
        for model, method, setting, harm, task in figures
        for split in ("validation", "test")
    ]


def test_sentences_follow_the_figures() -> None:
    found = "\n".join(table.findings(experiment(half=80, projected=30)))
    assert "SafeLoRA on dirty-lora (7 modules) leaves 40 % harmful at 30 % task accuracy; no better than" in found
    assert "at 0 of 1 numbers of modules: what it does here is shrink the delta." in found
    assert "default weights, on every module, leave 60 % harmful: too weak here; weights 0.6/0.4 leave 5 %." in found
    assert "At 1 of 1 weights" in found
    assert "no reliable information" in found


def test_sentences_do_not_say_what_the_figures_do_not() -> None:
    found = "\n".join(table.findings(experiment(half=95, projected=45)))
    assert "better than `scale` of equal safety, 40 %" in found
    assert "at 1 of 1 numbers of modules." in found
    assert "At 0 of 1 weights" in found
    assert "no reliable information" not in found
