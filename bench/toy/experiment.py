"""One seed from trained models to rows: defend, load each model as users would, ask it, write down what it answers."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from safeshard.bench.rows import environment
from safeshard.bench.toy.defences import run_defences
from safeshard.bench.toy.evaluation import evaluate
from safeshard.bench.toy.language import SPLITS
from safeshard.bench.toy.models import is_made, load_model, make_models, path_of, quieten, seconds_of
from safeshard.bench.toy.recipes import STAGES
from safeshard.bench.toy.table import COLUMNS, Row, read
from safeshard.bench.toy.tokenizer import make_tokenizer

ROWS = "rows.csv"
QUICK = ("unaligned", "aligned", "dirty-full", "dirty-lora", "safe-lora")


def run(folder: Path, seeds: Sequence[int], quick: bool, say: Callable[[str], None]) -> list[Row]:
    """Train what is missing, defend and evaluate each seed; return all rows. A finished seed is read back."""
    quieten()
    stages = QUICK if quick else tuple(STAGES)
    stale = [seed for seed in seeds if not all(is_made(folder, seed, name) for name in stages)]
    for seed in stale:
        (folder / f"seed-{seed}" / ROWS).unlink(missing_ok=True)
        shutil.rmtree(folder / f"seed-{seed}" / "outputs", ignore_errors=True)
    make_models(folder, seeds, stages, say)
    rows: list[Row] = []
    for seed in seeds:
        file = folder / f"seed-{seed}" / ROWS
        if not file.is_file():
            say(f"seed {seed}: defend and evaluate")
            write(file, list(_seed_rows(folder, seed, stages)))
        rows += read(file)
    return rows


def write(file: Path, rows: Sequence[Row]) -> None:
    """Write rows whole or not at all."""
    part = file.with_suffix(".part")
    with part.open("w", newline="") as out:
        table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    part.replace(file)


def _seed_rows(folder: Path, seed: int, stages: Sequence[str]) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        jobs, wall = run_defences(folder / f"seed-{seed}", stages)
        aligned, tokenizer, env = path_of(folder, seed, "aligned"), make_tokenizer(), environment()
        trained = [name for name in stages if name not in ("unaligned", "safe-lora")]
        models = [
            (name, "aligned" if name == "aligned" else "fine-tuned", "", path_of(folder, seed, name),
             seconds_of(folder, seed, name))
            for name in trained
        ]  # fmt: skip
        outputs = folder / f"seed-{seed}" / "outputs"
        models += [(job.model, job.label, job.setting, outputs / job.folder, wall / len(jobs)) for job in jobs]
        for model, method, setting, path, seconds in models:
            loaded = load_model(path, aligned)
            for split, prompts in SPLITS.items():
                scores = {name: f"{value:.2f}" for name, value in asdict(evaluate(loaded, tokenizer, prompts)).items()}
                yield {"seed": str(seed), "model": model, "method": method, "setting": setting, "split": split,
                       **scores, "seconds": f"{seconds:.2f}", **env}  # fmt: skip
    finally:
        torch.set_num_threads(threads)
