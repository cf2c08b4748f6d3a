"""The trained models of an experiment, cached as Hub-layout folders."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safeshard.bench.toy.recipes import LORA, STAGES, Stage
from safeshard.bench.toy.tokenizer import make_tokenizer
from safeshard.bench.toy.training import train
from safeshard.bench.workers import Task
from safeshard.streamer.extras import require

RECORD = "toy.json"  # in a trained model's folder: what it was made from, and the seconds that it took


def training(folder: Path, seed: int, stages: Sequence[str]) -> list[Task]:
    """The tasks that train what is missing of `folder`/seed-N/models/STAGE, each after its parent alone.

    A model is a function of its recipe, its seed and the versions of the libraries, not of what else is trained.
    """
    return [
        Task((seed, name), frozenset([(seed, STAGES[name].parent)]), make_model, (folder, seed, name))
        for name in stages
        if not is_made(folder, seed, name)
    ]


def path_of(folder: Path, seed: int, name: str) -> Path:
    """Where a trained model lies."""
    return folder / f"seed-{seed}" / "models" / name


def is_made(folder: Path, seed: int, name: str) -> bool:
    """Whether a finished model of this very recipe is there."""
    path = path_of(folder, seed, name)
    return holds(path, recipe_key(name, seed))


def holds(path: Path, key: str) -> bool:
    """Whether a folder holds a finished model of the recipe of this key."""
    if not (path / RECORD).is_file() or not any(path.glob("*.safetensors")):
        return False
    return bool(json.loads((path / RECORD).read_text())["recipe"] == key)


def seconds_of(folder: Path, seed: int, name: str) -> float:
    """How long its training took."""
    return float(json.loads((path_of(folder, seed, name) / RECORD).read_text())["seconds"])


def recipe_key(name: str, seed: int, stages: Mapping[str, Stage] = STAGES) -> str:
    """A hash of all that decides a model's weights: the recipes from the base on, the seed, the libraries."""
    packages = [version(package) for package in ("torch", "transformers", "peft")]
    text = json.dumps([[stage.settings() for stage in _ancestry(name, stages)], seed, packages])
    return hashlib.sha256(text.encode()).hexdigest()


def _ancestry(name: str, stages: Mapping[str, Stage]) -> Iterator[Stage]:
    current: str | None = name
    while current is not None:
        yield stages[current]
        current = stages[current].parent


def make_model(folder: Path, seed: int, name: str) -> float:
    """Train one stage and write its folder whole or not at all; return the seconds of training."""
    return train_below(folder / f"seed-{seed}" / "models", seed, name, STAGES)


def train_below(below: Path, seed: int, name: str, stages: Mapping[str, Stage]) -> float:
    """Train one of `stages` into `below`/NAME, whole or not at all, from its parent there; return the seconds."""
    stage, path = stages[name], below / name
    shutil.rmtree(path, ignore_errors=True)  # of another recipe
    tokenizer = make_tokenizer()
    offset = list(stages).index(name)
    model = _new(tokenizer, seed, stage) if stage.parent is None else load_model(below / stage.parent)
    if stage.lora:
        peft = require("peft", "bench")
        torch.manual_seed(seed + offset)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    start = time.perf_counter()
    train(model, tokenizer, stage, seed + offset)
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as scratch:
        made = Path(scratch, name)
        model.save_pretrained(made)
        if not stage.lora:
            tokenizer.save_pretrained(made)
        (made / RECORD).write_text(json.dumps({"recipe": recipe_key(name, seed, stages), "seconds": seconds}))
        made.rename(path)
    return seconds


def _new(tokenizer: Any, seed: int, stage: Stage) -> Any:
    transformers = require("transformers", "bench")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **stage.model,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def load_model(path: Path, aligned: Path | None = None) -> Any:
    """Load a checkpoint with transformers, or an adapter on `aligned` with PEFT."""
    transformers = require("transformers", "bench")
    if (path / "adapter_config.json").is_file() and aligned is not None:
        return require("peft", "bench").PeftModel.from_pretrained(load_model(aligned), path).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
