"""Utility by lm-evaluation-harness on a local task file, against likelihoods computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safeshard.bench.evaluation import evaluate
from safeshard.bench.evaluation.engines.transformers import Loader
from safeshard.bench.evaluation.intervals import wilson
from safeshard.bench.evaluation.suite import Suite

QUESTIONS = [("step of obj10" + str(n), n % 3) for n in range(6)]
CHOICES = ["step0", "step3", "step6"]


@pytest.mark.slow
def test_a_local_task(tmp_path: Path, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": q, "choices": CHOICES, "gold": g}) + "\n" for q, g in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "steps.yaml").write_text(
        "task: steps\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(data) + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n"
    )
    suite = Suite.model_validate({"name": "s", "parts": [
        {"name": "lm", "measures": "utility", "harness": {"tasks": ["steps"], "include_path": str(tmp_path / "tasks")}},
    ]})  # fmt: skip
    made = evaluate(tiny["aligned"], suite=suite, output=tmp_path / "out", device="cpu", quiet=True)
    [figure] = made.figures
    right = _right_by_hand(tiny["aligned"])
    assert (figure.part, figure.prompts, figure.value) == ("lm/steps", 6, right / 6)
    assert (figure.low, figure.high) == wilson(right, 6)
    monkeypatch.setattr("safeshard.bench.evaluation.harness.run_harness", None)  # the second time it is known
    assert evaluate(tiny["aligned"], suite=suite, output=tmp_path / "out", device="cpu", quiet=True) == made


def _right_by_hand(folder: str) -> int:
    engine = Loader("cpu", 1).open(folder, None)
    right = 0
    for question, gold in QUESTIONS:
        likely = []
        for choice in CHOICES:
            ids = engine.tokenizer(f"{question} {choice}", add_special_tokens=False, return_tensors="pt").input_ids
            logits = engine.model(ids).logits.float()
            likely.append(torch.log_softmax(logits[0, -2], -1)[ids[0, -1]].item())
        right += likely.index(max(likely)) == gold
    return right
