"""The defences of one seed: a jobs.yaml run by the real `batch` in one pass, after the real `score`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeshard import streamer
from safeshard.bench.toy.language import REFUSAL, REFUSED, TRAIN, requests, tasks
from safeshard.bench.toy.recipes import STAGES

OUTPUTS, SCORES = "outputs", "scores.csv"  # in the folder of a seed and a grid
TASK, KEEP = "task.jsonl", "harmless.jsonl"  # prompts without answers
WEIGHTS = ((0.8, 0.2), (0.7, 0.3), (0.6, 0.4))
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LEAKS = (0.002, 0.004, 0.008, 0.016, 0.032)
GAMMAS = (0.5, 1.0, 2.0)
ENTROPIES = (0.5, 0.8)
BLOCK = 32
BY_ROW = {"block_size": BLOCK, "selection": "row", "output_format": "checkpoint"}  # of an adapter too: no low rank
EVERY_MODULE = 1.01  # above every cosine


@dataclass(frozen=True)
class Grid:
    """Which models are trained, and which settings are tried on the fine-tuned ones."""

    name: str
    stages: tuple[str, ...]
    factors: tuple[float, ...]
    strengths: tuple[int, ...]
    penalties: tuple[float, ...]
    variants: bool  # by leak; Safe Delta by row and with one block; exact sums; gates that pick some of the modules


WHOLE = Grid("whole", tuple(STAGES), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), (3, 10, 30, 100), PENALTIES, True)
_TRAINED_QUICKLY = ("unaligned", "aligned", "dirty-full", "dirty-lora", "safe-lora")
QUICK = Grid("quick", _TRAINED_QUICKLY, (0.4, 0.5, 0.6), (30,), (0.1, 0.3), False)


@dataclass(frozen=True)
class Defence:
    """One job: on which fine-tuned model, how it is called in tables, and the options of its method."""

    model: str
    method: str
    label: str
    setting: str
    options: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The name of its output."""
        return f"{self.model}-{self.label}-{self.setting}".replace(" ", "-").replace("/", "-").replace(",", "")


def defences(grid: Grid, cosines: Sequence[float]) -> list[Defence]:
    """Every defence of the fine-tuned models of a grid; `cosines` are the gate's on dirty-lora."""
    found: list[Defence] = []
    for model in grid.stages:
        if model.startswith(("dirty", "attack")):
            found += _scales(model, grid)
            found += _safe_deltas(model, grid, "Safe Delta", {"block_size": BLOCK})
            found += _ridges(model, grid)
        if grid.variants and model.startswith("dirty"):
            found += _baselines(model)
        if model == "dirty-full":
            found += _ablations(model, grid)
        if grid.variants and model.startswith("dirty"):
            found += _safe_deltas(model, grid, "Safe Delta, by row", BY_ROW)
        if model in ("attack-lora", "dirty-lora"):
            found += _gated(model, grid, len(cosines))
        if grid.variants and model == "dirty-lora":
            found += _merge_variants(model, sorted(cosines))
    return found


def _scales(model: str, grid: Grid) -> Iterator[Defence]:
    for factor in grid.factors:
        yield Defence(model, "scale", "scale", f"factor {factor}", {"factor": factor})


def _safe_deltas(model: str, grid: Grid, label: str, options: Mapping[str, Any]) -> Iterator[Defence]:
    for s in grid.strengths:
        yield Defence(model, "safedelta", label, f"strength {s}", {"strength": s, **options})


def _ridges(model: str, grid: Grid) -> Iterator[Defence]:
    variants: dict[str, dict[str, Any]] = {"ridge": {}}
    if model.startswith("dirty"):
        variants["ridge, task data"] = {"task_data": TASK, "keep_data": KEEP}
    for label, options in variants.items():
        for penalty in grid.penalties:
            yield Defence(model, "ridge", label, f"penalty {penalty:g}", {"penalty": penalty, **options})
    if grid.variants and model.startswith("dirty"):
        for leak in LEAKS:
            yield Defence(model, "ridge", "ridge, by leak", f"leak {leak:g}", {"leak": leak})
        for leak in LEAKS:
            options = {"leak": leak, "block_size": BLOCK}
            yield Defence(model, "safedelta", "Safe Delta, by leak", f"leak {leak:g}", options)


def _baselines(model: str) -> Iterator[Defence]:
    """Published methods that add what alignment once added."""
    for gamma in GAMMAS:
        yield Defence(model, "resta", "RESTA", f"gamma {gamma:g}", {"gamma": gamma})
    for alpha in GAMMAS:
        for entropy in ENTROPIES:
            setting = f"alpha {alpha:g}, entropy {entropy:g}"
            yield Defence(model, "lssf", "LSSF", setting, {"alpha": alpha, "entropy": entropy})


def _ablations(model: str, grid: Grid) -> Iterator[Defence]:
    yield from _safe_deltas(model, grid, "Safe Delta, no compensation", {"block_size": BLOCK, "compensate": False})
    if grid.variants:
        yield from _safe_deltas(model, grid, "Safe Delta, one block", {})


def _gated(model: str, grid: Grid, count: int) -> Iterator[Defence]:
    yield from _merges(model, "SafeMERGE", {"threshold": EVERY_MODULE})
    for number in (count // 4, count // 2, 3 * count // 4, count) if grid.variants else (count // 2, count):
        yield Defence(model, "safelora", "SafeLoRA", f"{number} modules", {"num_layers": number})


def _merge_variants(model: str, cosines: Sequence[float]) -> Iterator[Defence]:
    middle = len(cosines) // 2
    half = (cosines[middle - 1] + cosines[middle]) / 2
    yield from _merges(model, "SafeMERGE, half gated", {"threshold": half})
    yield from _merges(model, "SafeMERGE, exact sum", {"threshold": EVERY_MODULE, "combine": "exact"})


def _merges(model: str, label: str, options: Mapping[str, Any]) -> Iterator[Defence]:
    for first, second in WEIGHTS:
        yield Defence(
            model, "safemerge", label, f"weights {first}/{second}", {"weights": [first, second], **options}
        )  # fmt: skip


def run_defences(models: Path, folder: Path, grid: Grid) -> tuple[list[Defence], float]:
    """Score and defend the models of one seed into `folder`; return the defences and the seconds of the batch."""
    common: dict[str, Any] = {"aligned": models / "aligned", "unaligned": models / "unaligned", "quiet": True}
    [scored] = streamer.score(**common, adapter=str(models / "dirty-lora"), output=folder / SCORES)
    jobs = defences(grid, [c for c in scored.cosines.values() if c is not None])
    data = folder / "refusals.jsonl"
    prompts = requests(REFUSED, TRAIN.requests, REFUSAL)
    data.write_text("".join(json.dumps({"instruction": e.prompt, "output": e.answer}) + "\n" for e in prompts))
    for name, prompts in ((TASK, tasks(TRAIN)), (KEEP, requests(TRAIN.harmless, TRAIN.requests))):
        (folder / name).write_text("".join(json.dumps({"instruction": e.prompt}) + "\n" for e in prompts))
    defaults = {
        "aligned": str(models / "aligned"), "unaligned": str(models / "unaligned"),
        "safe_adapter": str(models / "safe-lora"), "calibration": str(data),
    }  # fmt: skip
    entries = [
        {"method": job.method, ("adapter" if job.model.endswith("-lora") else "finetuned"): str(models / job.model),
         "output": str(folder / OUTPUTS / job.folder), **job.options,
         **{name: str(folder / job.options[name]) for name in ("task_data", "keep_data") if name in job.options}}
        for job in jobs
    ]  # fmt: skip
    file = folder / "jobs.yaml"
    file.write_text(json.dumps({"defaults": defaults, "jobs": entries}, indent=1))  # JSON is YAML
    results = streamer.batch(file, quiet=True)
    return jobs, max(r.manifest.run.wall_s for r in results if r.manifest)
