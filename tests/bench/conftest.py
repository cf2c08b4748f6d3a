"""A tiny model with a tokenizer and a chat template, and an adapter on it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safeshard.bench.toy.models import _new
from safeshard.bench.toy.recipes import STAGES
from safeshard.bench.toy.tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders `aligned` and `adapter`, of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    [first] = [stage for stage in STAGES.values() if stage.parent is None]
    model = _new(tokenizer, 0, first)
    model.save_pretrained(folder / "aligned")
    tokenizer.save_pretrained(folder / "aligned")
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(folder / "adapter")
    return {name: str(folder / name) for name in ("aligned", "adapter")}
