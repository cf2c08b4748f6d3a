"""The files of an evaluation: every answer, the figures as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safeshard.bench.evaluation import figures
from safeshard.bench.evaluation.graders.base import Verdict
from safeshard.bench.evaluation.graders.coherence import is_incoherent
from safeshard.bench.evaluation.prompts import Prompt
from safeshard.bench.evaluation.suite import Suite
from safeshard.manifests.evaluation import EVALUATION_NAME, Evaluation
from safeshard.streamer.disk import replace_file

ANSWERS = "answers.jsonl"


def write(
    folder: Path, evaluation: Evaluation, suite: Suite, prompts: Mapping[str, Sequence[Prompt]],
    answers: Mapping[str, Mapping[str, Sequence[str]]], verdicts: Mapping[tuple[str, str], Sequence[Verdict]],
) -> None:  # fmt: skip
    """Write all files, each whole or not at all, evaluation.json last."""
    lines = [
        {"model": model, "part": part.name, "number": n, "prompt": prompt.text, "target": prompt.target,
         "answer": answer, "value": verdict.value, "why": verdict.why, "incoherent": is_incoherent(answer)}
        for model in answers
        for part in suite.parts
        if part.prompts is not None
        for n, (prompt, answer, verdict) in enumerate(
            zip(prompts[part.name], answers[model][part.name], verdicts[model, part.name], strict=True)
        )
    ]  # fmt: skip
    replace_file(folder / ANSWERS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    replace_file(folder / "table.csv", figures.csv_table(evaluation).encode(errors="backslashreplace"))
    replace_file(folder / "table.md", figures.markdown(evaluation).encode(errors="backslashreplace"))
    replace_file(folder / "suite.json", (suite.model_dump_json(indent=2) + "\n").encode())
    replace_file(folder / EVALUATION_NAME, evaluation.to_json().encode())
