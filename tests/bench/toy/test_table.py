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
        row("scale", "low", "validation", 2, 10), row("scale", "low", "test", 50, 0),
        row("scale", "mid", "validation", 10, 30), row("scale", "mid", "test", 90, 0),
        row("scale", "high", "validation", 10.1, 90), row("scale", "high", "test", 0, 100),
        row("other", "a", "validation", 60, 90), row("other", "b", "validation", 50, 10),
    ]  # fmt: skip
    assert table.chosen(rows) == {("m", "scale"): ("m", "scale", "mid"), ("m", "other"): ("m", "other", "b")}


def test_means_and_ranges_over_seeds() -> None:
    rows = [
        row("scale", "x", split, harm, 40, seed) for split in ("validation", "test") for seed, harm in ((0, 0), (1, 9))
    ]
    assert "| m | scale | x | 4 (0-9) | 96 (91-100) | 100 (100-100) | 40 (40-40) |" in table.markdown(rows)
