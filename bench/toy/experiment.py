"""One seed from trained models to rows: defend, load each model as users would, ask it, write down what it answers."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safeshard.bench.rows import environment, write_table
from safeshard.bench.toy.defences import OUTPUTS, Grid, defences, run_defences
from safeshard.bench.toy.evaluation import evaluate
from safeshard.bench.toy.language import SPLITS
from safeshard.bench.toy.models import load_model, path_of, recipe_key, seconds_of, training
from safeshard.bench.toy.table import COLUMNS, Row, read
from safeshard.bench.toy.tokenizer import make_tokenizer
from safeshard.bench.workers import PROCESSES, Task, run_tasks

MODELS, PART = "models.json", "part-{}.csv"  # in the folder of a seed and a grid: what to judge, and rows of a part


def run(folder: Path, seeds: Sequence[int], grid: Grid, say: Callable[[str], None]) -> list[Row]:
    """Train what is missing, defend and evaluate each seed; return all rows. A finished seed is read back."""
    missing = [seed for seed in seeds if not rows_of(folder, seed, grid).is_file()]
    tasks = [task for seed in missing for task in training(folder, seed, grid.stages)]
    for seed in missing:
        tasks += _judging(folder, seed, grid)

    def done(task: Task, seconds: float) -> None:
        say(f"seed {task.name[0]}: {task.name[1]}, {seconds:.0f} s")

    run_tasks(tasks, done)
    return [row for seed in seeds for row in read(rows_of(folder, seed, grid))]


def folder_of(folder: Path, seed: int, grid: Grid) -> Path:
    """Where a seed's jobs, outputs, scores and rows lie."""
    return folder / f"seed-{seed}" / grid.name


def rows_of(folder: Path, seed: int, grid: Grid) -> Path:
    """The file of a seed's finished rows, named by all that decides them: recipes, jobs, prompts, versions."""
    recipes = [recipe_key(name, seed) for name in grid.stages]
    jobs = [asdict(defence) for defence in defences(grid, (0.0, 1.0))]
    splits = [asdict(split) for split in SPLITS.values()]
    text = json.dumps([recipes, jobs, splits, version("safeshard")])
    return folder_of(folder, seed, grid) / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv"


def write(file: Path, rows: Sequence[Row]) -> None:
    """Write rows whole or not at all."""
    write_table(file, rows, COLUMNS)


def _judging(folder: Path, seed: int, grid: Grid) -> list[Task]:
    """The tasks that defend the trained models of a seed and judge all of them, in as many parts as processes."""
    trained = frozenset((seed, name) for name in grid.stages)
    parts = [f"evaluated {part + 1}/{PROCESSES}" for part in range(PROCESSES)]
    defended = frozenset([(seed, "defended")])
    return [
        Task((seed, "defended"), trained, _defend, (folder, seed, grid)),
        *(Task((seed, name), defended, _evaluate, (folder, seed, grid, part)) for part, name in enumerate(parts)),
        Task((seed, "written down"), frozenset((seed, name) for name in parts), _join, (folder, seed, grid)),
    ]


def _defend(folder: Path, seed: int, grid: Grid) -> float:
    """Defend a seed anew and list the models to judge: [model, method, setting, folder, seconds]."""
    start, work = time.perf_counter(), folder_of(folder, seed, grid)
    shutil.rmtree(work, ignore_errors=True)  # of another grid or recipe, or cut short
    work.mkdir(parents=True)
    jobs, wall = run_defences(folder / f"seed-{seed}" / "models", work, grid)
    models: list[tuple[Any, ...]] = [
        (name, "aligned" if name == "aligned" else "fine-tuned", "", path_of(folder, seed, name),
         seconds_of(folder, seed, name))
        for name in grid.stages if name not in ("unaligned", "safe-lora")
    ]  # fmt: skip
    models += [(job.model, job.label, job.setting, work / OUTPUTS / job.folder, wall / len(jobs)) for job in jobs]
    (work / MODELS).write_text(json.dumps(models, default=str))
    return time.perf_counter() - start


def _evaluate(folder: Path, seed: int, grid: Grid, part: int) -> float:
    """Judge one of PROCESSES equal parts of a seed's models on every split, as rows in a file of their own."""
    start, work = time.perf_counter(), folder_of(folder, seed, grid)
    models = json.loads((work / MODELS).read_text())
    first, last = (len(models) * end // PROCESSES for end in (part, part + 1))
    aligned, tokenizer, env = path_of(folder, seed, "aligned"), make_tokenizer(), environment()
    rows: list[Row] = []
    for model, method, setting, path, seconds in models[first:last]:
        loaded = load_model(Path(path), aligned)
        for split, prompts in SPLITS.items():
            scores = {name: f"{value:.2f}" for name, value in asdict(evaluate(loaded, tokenizer, prompts)).items()}
            rows.append({"seed": str(seed), "model": model, "method": method, "setting": setting, "split": split,
                         **scores, "seconds": f"{seconds:.2f}", **env})  # fmt: skip
    write(work / PART.format(part), rows)
    return time.perf_counter() - start


def _join(folder: Path, seed: int, grid: Grid) -> float:
    """Write down the rows of all parts: the seed is finished."""
    work = folder_of(folder, seed, grid)
    write(rows_of(folder, seed, grid), [row for part in range(PROCESSES) for row in read(work / PART.format(part))])
    return 0.0
