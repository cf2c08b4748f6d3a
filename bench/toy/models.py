"""The trained models of an experiment, cached as Hub-layout folders, trained in two processes of one thread each."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safeshard.bench.toy.recipes import LORA, MODEL, STAGES, Stage
from safeshard.bench.toy.tokenizer import make_tokenizer
from safeshard.bench.toy.training import train
from safeshard.streamer.extras import require

RECORD = "toy.json"  # in a trained model's folder: what it was made from, and the seconds that it took
PROCESSES = 2


def make_models(folder: Path, seeds: Sequence[int], stages: Sequence[str], say: Callable[[str], None]) -> bool:
    """Train what is missing of `folder`/seed-N/models/STAGE; return whether anything was.

    A stage waits for its parent alone, so two are trained at once. A model is a function of its recipe, its seed and
    the versions of the libraries, not of what else is trained.
    """
    waiting = [(seed, name) for seed in seeds for name in stages if not is_made(folder, seed, name)]
    if not waiting:
        return False
    context = multiprocessing.get_context("spawn")
    running: dict[Future[float], tuple[int, str]] = {}
    pool = ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_prepare)
    try:
        while waiting or running:
            missing = {*waiting, *running.values()}
            for item in [i for i in waiting if (i[0], STAGES[i[1]].parent) not in missing]:
                waiting.remove(item)
                running[pool.submit(make_model, folder, *item)] = item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                seed, name = running.pop(future)
                say(f"seed {seed}: trained {name} in {future.result():.0f} s")
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return True


def path_of(folder: Path, seed: int, name: str) -> Path:
    """Where a trained model lies."""
    return folder / f"seed-{seed}" / "models" / name


def is_made(folder: Path, seed: int, name: str) -> bool:
    """Whether a finished model of this very recipe is there."""
    record = path_of(folder, seed, name) / RECORD
    return record.is_file() and bool(json.loads(record.read_text())["recipe"] == recipe_key(name, seed))


def seconds_of(folder: Path, seed: int, name: str) -> float:
    """How long its training took."""
    return float(json.loads((path_of(folder, seed, name) / RECORD).read_text())["seconds"])


def recipe_key(name: str, seed: int) -> str:
    """A hash of all that decides a model's weights: the recipes from the base on, the seed, the libraries."""
    packages = [version(package) for package in ("torch", "transformers", "peft")]
    text = json.dumps([[stage.settings() for stage in _ancestry(name)], seed, packages])
    return hashlib.sha256(text.encode()).hexdigest()


def _ancestry(name: str) -> Iterator[Stage]:
    current: str | None = name
    while current is not None:
        yield STAGES[current]
        current = STAGES[current].parent


def make_model(folder: Path, seed: int, name: str) -> float:
    """Train one stage and write its folder whole or not at all; return the seconds of training."""
    stage, path = STAGES[name], path_of(folder, seed, name)
    shutil.rmtree(path, ignore_errors=True)  # of another recipe
    tokenizer = make_tokenizer()
    offset = list(STAGES).index(name)
    model = _new(tokenizer, seed) if stage.parent is None else load_model(path_of(folder, seed, stage.parent))
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
        (made / RECORD).write_text(json.dumps({"recipe": recipe_key(name, seed), "seconds": seconds}))
        made.rename(path)
    return seconds


def _new(tokenizer: Any, seed: int) -> Any:
    transformers = require("transformers", "bench")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **MODEL,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def load_model(path: Path, aligned: Path | None = None) -> Any:
    """Load a checkpoint with transformers, or an adapter on `aligned` with PEFT."""
    transformers = require("transformers", "bench")
    if (path / "adapter_config.json").is_file() and aligned is not None:
        return require("peft", "bench").PeftModel.from_pretrained(load_model(aligned), path).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()


def quieten() -> None:
    """No progress bars and no notes of the libraries between the lines of the experiment."""
    transformers = require("transformers", "bench")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    quieten()
