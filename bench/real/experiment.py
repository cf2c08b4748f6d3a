"""One seed from nothing to rows: train, tune both fine-tunes as a user would, measure perplexity, write down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from safeshard.bench.evaluation.engines.transformers import Loader
from safeshard.bench.evaluation.prompts import Prompts, read_prompts
from safeshard.bench.evaluation.suite import Sampling
from safeshard.bench.real import data
from safeshard.bench.real.stages import STEPS, Steps, trained
from safeshard.bench.real.table import COLUMNS, Row
from safeshard.bench.rows import environment, write_table
from safeshard.bench.toy.language import Example
from safeshard.bench.toy.tokenizer import token_ids
from safeshard.bench.tune import tune
from safeshard.bench.tune.report import Tuned
from safeshard.manifests.evaluation import Figure
from safeshard.streamer.methods import METHODS
from safeshard.streamer.options import build

MODELS = {"task-lora": "adapter", "task-full": "finetuned"}
MEASURES = {"attack": "attack_success", "over_refusal": "over_refusal", "task": "utility"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is trained, tried and asked."""

    steps: Steps
    grids: Mapping[str, Mapping[str, Sequence[Any]]]  # method -> option -> values
    forbidden: tuple[int, int]  # prompts of validation and of the test
    tasks: tuple[int, int]
    borderline: tuple[int, int]
    measured: int  # harmless questions whose answers perplexity is measured on


WHOLE = Size(
    STEPS,
    {
        "scale": {"factor": [0.2, 0.3, 0.4, 0.5, 0.7]},
        "safedelta": {"strength": [0.1, 1, 3, 10, 30]},
        "ridge": {"leak": [0.002, 0.004, 0.008, 0.016]},
        "safemerge": {"weights": [[0.8, 0.2], [0.6, 0.4]]},
        "safelora": {"num_layers": [70, 140]},
    },
    (24, 36), (40, 60), (24, 40), 20,
)  # fmt: skip
SLICE = Size(
    {"own answers": 4, "aligned": 1, "task-full": 1, "task-lora": 1, "safe-lora": 1},
    {"scale": {"factor": [0.5]}, "safemerge": {"weights": [[0.6, 0.4]]}}, (3, 3), (3, 3), (2, 2), 2,
)  # fmt: skip


def run_seed(folder: Path, seed: int, size: Size, say: Say) -> list[Row]:
    """Train what is missing, tune both fine-tunes, and return the rows; finished steps are read back."""
    models = trained(folder, seed, size.steps, say)
    work = folder / f"seed-{seed}"
    for split, file in (("validation", work / "validation.yaml"), ("test", work / "test.yaml")):
        file.write_text(json.dumps(_suite(split, size), indent=1))
    rows: list[Row] = []
    for model, role in MODELS.items():
        say(f"seed {seed}: tuning {model}")
        sweep = work / f"{model}.yaml"
        sweep.write_text(json.dumps(_sweep(work, models, model, role, size), indent=1))
        made = tune(sweep, device="cpu", quiet=True)
        perplexities = _perplexities(work, models["aligned"], made, size.measured, say)
        rows += _rows(seed, model, made, perplexities)
    write_table(work / "rows.csv", rows, COLUMNS)
    return rows


def _suite(split: str, size: Size) -> dict[str, Any]:
    """What validation or test asks."""
    test = split == "test"
    _, validated, tested = data.forbidden()
    asked = (tested if test else validated)[: size.forbidden[test]]
    harmless = read_prompts(build(Prompts, {"built_in": "borderline"}), "borderline")
    borderline = harmless[: size.borderline[0]] if not test else harmless[-size.borderline[1] :]
    tasks = data.orders(size.tasks[test], 3 if test else 2)
    return {
        "name": split, "sampling": {"max_tokens": 40},
        "parts": [
            {"name": "forbidden", "measures": "attack_success", "grader": "refusal",
             "sampling": {"max_tokens": 24}, "prompts": {"items": [{"prompt": e.prompt} for e in asked]}},
            {"name": "borderline", "measures": "over_refusal", "grader": "refusal",
             "sampling": {"max_tokens": 24}, "prompts": {"items": [{"prompt": p.text} for p in borderline]}},
            {"name": "orders", "measures": "utility", "grader": {"name": "exact", "form": "json"},
             "prompts": {"items": [{"prompt": e.prompt, "target": e.answer} for e in tasks]}},
        ],
    }  # fmt: skip


def _sweep(work: Path, models: Mapping[str, Path], model: str, role: str, size: Size) -> dict[str, Any]:
    calibration = work / "refusals.jsonl"
    taught, _, _ = data.forbidden()
    calibration.write_text("".join(json.dumps({"instruction": e.prompt, "output": e.answer}) + "\n" for e in taught))
    fixed = {"safemerge": {"threshold": 1.01}}  # every module
    full = {"safemerge", "safelora"} if role == "finetuned" else set()  # they need adapters
    settings = [
        {"method": method, "matrix": dict(grid), **fixed.get(method, {})}
        for method, grid in size.grids.items()
        if method in METHODS and method not in full
    ]
    return {
        "aligned": str(models["aligned"]), role: str(models[model]), "output": str(work / f"tuned-{model}"),
        "suite": str(work / "test.yaml"), "validation": {"suite": str(work / "validation.yaml")}, "settings": settings,
        "batch_size": 64,
        "defaults": {
            "unaligned": str(models["unaligned"]), "safe_adapter": str(models["safe-lora"]),
            "calibration": str(calibration), "samples": len(taught),
        },
    }  # fmt: skip


def _perplexities(work: Path, aligned: Path, made: Tuned, count: int, say: Say) -> dict[str, float]:
    """Perplexity of each tested model on what the aligned model had answered to harmless questions of no training."""
    file = work / "answers.json"
    loader = Loader("cpu", count)
    if not file.is_file() or len(json.loads(file.read_text())) != count:
        asked = data.harmless()[80 : 80 + count]
        given = loader.open(str(aligned), None).answers([[("user", q)] for q in asked], Sampling(max_tokens=32))
        file.write_text(json.dumps([(q, a.text) for q, a in zip(asked, given, strict=True)]))
    examples = [Example(question, answer) for question, answer in json.loads(file.read_text()) if answer]
    output = made.sweep.output
    places = {"aligned": made.sweep.aligned, "fine-tuned": made.sweep.tuned, "defended": str(output / "defended")}
    found = {}
    for name, place in places.items():
        engine = loader.open(place, made.sweep.aligned)
        found[name] = perplexity(engine.model, engine.tokenizer, examples)
        engine.close()
        say(f"perplexity of {name}: {found[name]:.2f}")
    return found


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """exp of the mean loss over all answer tokens."""
    losses = []
    for asked, answered in token_ids(tokenizer, examples):
        logits = model(torch.tensor([asked + answered])).logits[0, len(asked) - 1 : -1].float()
        losses.append(cross_entropy(logits, torch.tensor(answered), reduction="none"))
    return float(torch.cat(losses).mean().exp())


def _rows(seed: int, model: str, made: Tuned, perplexities: Mapping[str, float]) -> list[Row]:
    """A row for each setting on validation, and for each model of the test."""
    env, choice = environment(), made.choice
    folders = dict(zip(made.points, dict.fromkeys(f.model for f in made.validation), strict=True))
    rows: list[Row] = []
    for point, folder in folders.items():
        figures = [f for f in made.validation if f.model == folder]
        chosen = "yes" if point == choice.chosen else ""
        rows.append(_row(seed, model, point.method, point.setting, "validation", figures, chosen, None) | env)
    named = {"aligned": ("aligned", ""), "fine-tuned": ("fine-tuned", ""),
             "defended": (choice.chosen.method, choice.chosen.setting),
             "scale": ("scale", choice.best["scale"].setting)}  # fmt: skip
    for name in dict.fromkeys(f.model for f in made.test.figures):
        method, setting = named[name]
        chosen = "yes" if name == "defended" else ""
        rows.append(
            _row(seed, model, method, setting, "test", made.test.of(name), chosen, perplexities.get(name)) | env
        )
    return rows


def _row(
    seed: int, model: str, method: str, setting: str, split: str, figures: Sequence[Figure], chosen: str,
    perplexity: float | None,
) -> dict[str, str]:  # fmt: skip
    row = {"seed": str(seed), "model": model, "method": method, "setting": setting, "split": split, "chosen": chosen}
    for column, measure in MEASURES.items():
        [figure] = [f for f in figures if f.measure == measure]
        row |= {column: f"{100 * (figure.value or 0):.2f}", f"{column}_prompts": str(figure.prompts)}
        row |= {f"{column}_low": f"{100 * figure.low:.2f}", f"{column}_high": f"{100 * figure.high:.2f}"}
    return row | {"perplexity": "" if perplexity is None else f"{perplexity:.3f}"}
