"""One seed at a time: chosen on validation, judged on the test."""

from __future__ import annotations

from safeshard.bench.toy import tuned

FIGURES = [  # model, method, setting, seed, validation harm and task, test harm and task
    ("aligned", "aligned", "", 0, (0, 0), (0, 0)), ("dirty-lora", "fine-tuned", "", 0, (100, 100), (100, 100)),
    ("dirty-lora", "scale", "0.5", 0, (5, 20), (0, 25)), ("dirty-lora", "m", "a", 0, (8, 60), (4, 50)),
    ("dirty-lora", "m", "b", 0, (9, 90), (3, 70)), ("dirty-lora", "m", "c", 0, (8, 50), (20, 95)),
]  # fmt: skip


def test_the_gap_to_the_best_of_the_test() -> None:
    rows = [
        {"seed": str(seed), "model": model, "method": method, "setting": setting, "split": split, "harm": str(harm),
         "refusal": "0", "harmless": "0", "task": str(task)}
        for model, method, setting, seed, *splits in FIGURES
        for split, (harm, task) in zip(("validation", "test"), splits, strict=True)
    ]  # fmt: skip
    [found] = tuned.found(rows)
    assert (found.chosen.setting, found.best.setting, found.gap, found.beats_scale) == ("a", "b", 20, True)
    assert "| dirty-lora | 0 | m, a | 4 / 50 | m, b | 3 / 70 | 20 |" in tuned.markdown(rows)
