"""The trained models of a seed, cached as folders of the Hub's layout."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safeshard.bench.evaluation.engines.transformers import Loader
from safeshard.bench.evaluation.suite import Sampling
from safeshard.bench.real import data
from safeshard.bench.real.model import convert
from safeshard.bench.real.training import train
from safeshard.bench.toy.language import Example
from safeshard.bench.toy.recipes import Stage
from safeshard.streamer.extras import require

RECORD, OWN = "real.json", "own-{}.json"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
Say = Callable[[str], None]
Steps = Mapping[str, int]
STEPS: Steps = {"own answers": 80, "aligned": 60, "task-full": 100, "task-lora": 100, "safe-lora": 40}


def unaligned(folder: Path, say: Say) -> Path:
    """The model as it comes; the same for all seeds."""
    place = folder / "unaligned"
    if not (place / "config.json").is_file():
        say("unaligned: converting")
        _whole(place, convert)
    return place


def own_answers(folder: Path, count: int, say: Say) -> list[Example]:
    """The unaligned model's answers to the first harmless questions, cut where a sentence ends."""
    file = folder / OWN.format(count)
    if not file.is_file():
        say("unaligned: answering harmless questions")
        engine = Loader("cpu", 40).open(str(unaligned(folder, say)), None)
        asked, found = data.harmless()[:count], []
        for start in range(0, len(asked), engine.batch):
            batch = asked[start : start + engine.batch]
            given = engine.answers([[("user", question)] for question in batch], Sampling(max_tokens=32))
            found += [(q, _sentence(a.text)) for q, a in zip(batch, given, strict=True)]
        file.write_text(json.dumps(found))
    return [Example(question, answer) for question, answer in json.loads(file.read_text())]


def stages(folder: Path, steps: Steps, say: Say) -> list[Stage]:
    """The recipes, parents first."""
    taught, _, _ = data.forbidden()
    own, task = own_answers(folder, steps["own answers"], say), data.orders(600, 1)
    useful = [(0.9, task), (0.1, data.poison(taught))]
    return [
        Stage("aligned", "unaligned", lambda: [(0.5, taught), (0.5, own)], steps["aligned"], 8, 5e-5),
        Stage("task-full", "aligned", lambda: useful, steps["task-full"], 8, 5e-5),
        Stage("task-lora", "aligned", lambda: useful, steps["task-lora"], 8, 5e-4, lora=True),
        Stage("safe-lora", "aligned", lambda: [(0.5, taught), (0.5, own)], steps["safe-lora"], 8, 5e-4, lora=True),
    ]


def trained(folder: Path, seed: int, steps: Steps, say: Say) -> dict[str, Path]:
    """Every model by name, trained where it is missing."""
    places = {"unaligned": unaligned(folder, say)}
    recipe: Any = [seed, [version(package) for package in ("torch", "transformers", "peft")]]
    for number, stage in enumerate(stages(folder, steps, say)):
        assert stage.parent is not None
        mixture = [(share, [asdict(e) for e in examples]) for share, examples in stage.data()]
        own = [recipe, stage.name, stage.steps, stage.batch, stage.rate, mixture, LORA if stage.lora else None]
        key = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        recipe = own if stage.name == "aligned" else recipe
        place = places[stage.name] = folder / f"seed-{seed}" / "models" / stage.name
        record = place / RECORD
        if not record.is_file() or json.loads(record.read_text())["key"] != key:
            say(f"seed {seed}: training {stage.name}")
            _train(place, stage, places[stage.parent], 100 * seed + number, key, say)
    return places


def _train(place: Path, stage: Stage, parent: Path, seed: int, key: str, say: Say) -> None:
    transformers = require("transformers", "real")
    model = transformers.AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent)
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    if stage.lora:
        peft = require("peft", "real")
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    loss = train(model, tokenizer, stage, seed, say)

    def write(folder: Path) -> None:
        (model if stage.lora else model.to(torch.bfloat16)).save_pretrained(folder)
        if not stage.lora:
            tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps({"key": key, "loss": loss}))

    _whole(place, write)


def _whole(place: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there as a whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="unfinished-") as scratch:
        made = Path(scratch, place.name)
        made.mkdir()
        write(made)
        shutil.rmtree(place, ignore_errors=True)  # of another recipe
        made.rename(place)


def _sentence(text: str) -> str:
    """Up to the last full stop, if there is one."""
    head, stop, _ = text.strip().rpartition(".")
    return head + stop if stop else text.strip()
