"""The defences of one seed: a jobs.yaml run by the real `batch` in one pass, after the real `score`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeshard import streamer
from safeshard.bench.toy.language import REFUSAL, REFUSED, TRAIN, requests

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STRENGTHS = (3, 10, 30, 100, 300)
WEIGHTS = ((0.8, 0.2), (0.7, 0.3), (0.6, 0.4))
BLOCK = 32
EVERY_MODULE = 1.01  # above every cosine


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


def defences(stages: Sequence[str], cosines: Sequence[float]) -> list[Defence]:
    """Every defence of the fine-tuned models among `stages`; `cosines` are the gate's on dirty-lora."""
    found: list[Defence] = []
    for model in stages:
        if model.endswith("-full"):
            found += [*_scales(model), *_safe_deltas(model, BLOCK)]
        elif model.endswith("-lora") and model != "safe-lora":
            found += _scales(model)
        if model == "dirty-full":
            found += _ablations(model)
        if model == "dirty-lora":
            found += [*_safe_deltas(model, BLOCK), *_gated(model, sorted(cosines))]
    return found


def _scales(model: str) -> Iterator[Defence]:
    for factor in FACTORS:
        yield Defence(model, "scale", "scale", f"factor {factor}", {"factor": factor})


def _safe_deltas(model: str, block: int) -> Iterator[Defence]:
    for s in STRENGTHS:
        yield Defence(model, "safedelta", "Safe Delta", f"strength {s}", {"strength": s, "block_size": block})


def _ablations(model: str) -> Iterator[Defence]:
    for s in STRENGTHS:
        options = {"strength": s, "block_size": BLOCK}
        off = options | {"compensate": False}
        yield Defence(model, "safedelta", "Safe Delta, no compensation", f"strength {s}", off)
        yield Defence(model, "safedelta", "Safe Delta, by row", f"strength {s}", options | {"selection": "row"})
        yield Defence(model, "safedelta", "Safe Delta, one block", f"strength {s}", {"strength": s})


def _gated(model: str, cosines: Sequence[float]) -> Iterator[Defence]:
    count = len(cosines)
    half = (cosines[count // 2 - 1] + cosines[count // 2]) / 2
    for weights in WEIGHTS:
        name = f"weights {weights[0]}/{weights[1]}"
        options = {"weights": list(weights), "threshold": EVERY_MODULE}
        yield Defence(model, "safemerge", "SafeMERGE", name, options)
        yield Defence(model, "safemerge", "SafeMERGE, half gated", name, options | {"threshold": half})
    for number in (count // 4, count // 2, 3 * count // 4, count):
        yield Defence(model, "safelora", "SafeLoRA", f"{number} modules", {"num_layers": number})


def run_defences(folder: Path, stages: Sequence[str]) -> tuple[list[Defence], float]:
    """Score and defend the models of one seed; return the defences and the seconds of the batch."""
    models, outputs = folder / "models", folder / "outputs"
    adapter = str(models / "dirty-lora")
    common: dict[str, Any] = {"aligned": models / "aligned", "unaligned": models / "unaligned", "quiet": True}
    [scored] = streamer.score(**common, adapter=adapter, output=folder / "scores.csv", overwrite=True)
    jobs = defences(stages, [c for c in scored.cosines.values() if c is not None])
    data = folder / "refusals.jsonl"
    prompts = requests(REFUSED, TRAIN.requests, REFUSAL)
    data.write_text("".join(json.dumps({"instruction": e.prompt, "output": e.answer}) + "\n" for e in prompts))
    defaults = {
        "aligned": str(models / "aligned"), "unaligned": str(models / "unaligned"),
        "safe_adapter": str(models / "safe-lora"), "calibration": str(data),
    }  # fmt: skip
    entries = [
        {"method": job.method, ("adapter" if job.model.endswith("-lora") else "finetuned"): str(models / job.model),
         "output": str(outputs / job.folder), **job.options}
        for job in jobs
    ]  # fmt: skip
    file = folder / "jobs.yaml"
    file.write_text(json.dumps({"defaults": defaults, "jobs": entries}, indent=1))  # JSON is YAML
    results = streamer.batch(file, quiet=True)
    return jobs, max(r.manifest.run.wall_s for r in results if r.manifest)
