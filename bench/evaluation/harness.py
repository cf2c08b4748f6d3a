"""Utility by lm-evaluation-harness, on its own tasks or on task files of the user's."""

from __future__ import annotations

import json
import logging
from typing import Any

from safeshard.bench.evaluation.engines.open import is_adapter
from safeshard.bench.evaluation.intervals import Z, wilson
from safeshard.bench.evaluation.suite import Harness
from safeshard.manifests.errors import RunError, printable
from safeshard.manifests.evaluation import Figure
from safeshard.streamer.extras import require

SHARES = ("acc", "exact_match", "acc_norm")  # means of zeros and ones
Scores = dict[str, list[Any]]  # task -> metric, value, standard error, number of questions


def run_harness(part: Harness, model: str, aligned: str | None, device: str, batch: int) -> Scores:
    """Run the tasks on a checkpoint, or on an adapter on `aligned`.

    Raises:
        RunError: the harness failed.
    """
    lm_eval = require("lm_eval", "evaluate")
    tasks = require("lm_eval.tasks", "evaluate")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    adapter = aligned is not None and is_adapter(model)
    name, _, revision = str(aligned if adapter else model).removeprefix("hf://").partition("@")
    arguments = {"pretrained": name, "revision": revision or "main", "dtype": "auto", "trust_remote_code": False}
    try:
        result = lm_eval.simple_evaluate(
            model="hf", model_args=arguments | ({"peft": model} if adapter else {}), tasks=list(part.tasks),
            num_fewshot=part.shots, limit=part.limit, batch_size=batch, device=device, log_samples=False,
            task_manager=tasks.TaskManager(include_path=str(part.include_path) if part.include_path else None),
        )  # fmt: skip
    except Exception as error:  # what tasks, data sets and models raise
        raise RunError(f"{model}: lm-evaluation-harness: {type(error).__name__}: {printable(error)}") from error
    counts = result.get("n-samples", {})
    return {
        task: _score(scores, counts.get(task, {}).get("effective", 0)) for task, scores in result["results"].items()
    }


def figures(model: str, part: str, harness: Harness, scores: Scores) -> list[Figure]:
    """One figure a task: its first share, with Wilson's interval; else its first score, by the standard error."""
    found = []
    for task, (metric, value, error, count) in scores.items():
        if not 0 <= value <= 1:
            raise RunError(f"{task}: {metric} is {value:g}, no share", "choose tasks that are scored from 0 to 1")
        half = Z * error
        bounds = wilson(value * count, count) if metric in SHARES else (max(0.0, value - half), min(1.0, value + half))
        found.append(
            Figure(
                model=model, part=f"{part}/{task}", measure="utility", value=value, low=bounds[0], high=bounds[1],
                prompts=count, ungraded=0, incoherent=None, source=f"lm-eval {task}",
                grader=metric + (f", {harness.shots} shots" if harness.shots is not None else ""), sampling="greedy",
                max_tokens=None,
            )
        )  # fmt: skip
    return found


def to_text(scores: Scores) -> str:
    """For the store."""
    return json.dumps(scores)


def _score(scores: dict[str, Any], count: int) -> list[Any]:
    values = {k.partition(",")[0]: v for k, v in scores.items() if isinstance(v, int | float) and "stderr" not in k}
    metric = next((name for name in SHARES if name in values), next(iter(values)))
    key = next(k for k in scores if k.partition(",")[0] == metric)
    error = scores.get(f"{metric}_stderr,{key.partition(',')[2]}", 0)
    return [metric, float(values[metric]), float(error) if isinstance(error, int | float) else 0.0, int(count)]
