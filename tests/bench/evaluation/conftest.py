"""A tiny model with a tokenizer and a chat template, an adapter on it, and models that answer by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safeshard.bench.evaluation.engines.base import Answer, InProcess
from safeshard.bench.evaluation.engines.open import Engines
from safeshard.bench.evaluation.prompts import Message
from safeshard.bench.evaluation.suite import Sampling
from safeshard.bench.toy.models import _new
from safeshard.bench.toy.tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders `aligned` and `adapter`, of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    model = _new(tokenizer, 0)
    model.save_pretrained(folder / "aligned")
    tokenizer.save_pretrained(folder / "aligned")
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(folder / "adapter")
    return {name: str(folder / name) for name in ("aligned", "adapter")}


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
