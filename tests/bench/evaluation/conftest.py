"""Models that answer by a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from safeshard.bench.evaluation.engines.base import Answer, InProcess
from safeshard.bench.evaluation.engines.open import Engines
from safeshard.bench.evaluation.prompts import Message
from safeshard.bench.evaluation.suite import Sampling

Rule = Callable[[str, str], Answer]  # what a model of this name answers to a text


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], list[str]]:
    """Let every model answer by a rule; returns the list that the names of models asked, a batch each, go to."""

    def use(rule: Rule) -> list[str]:
        asked: list[str] = []

        def open_model(engines: Engines, model: str, aligned: str | None) -> Any:
            def answers(conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Answer]:
                asked.append(model)
                return [rule(model, turns[-1][1]) for turns in conversations]

            engine = InProcess(lambda *_: [], engines.batch)
            engine.answers = answers  # type: ignore[method-assign]
            return engine

        monkeypatch.setattr(Engines, "open", open_model)
        return asked

    return use


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Two folders that look like checkpoints."""
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").touch()
    return [str(tmp_path / "good"), str(tmp_path / "bad")]
