"""Whole jobs as a user runs them: a process each, timed from outside, against a process that reads the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safeshard.bench.inputs.models import SHAPES, prepare
from safeshard.bench.machine.measure import SAFESHARD, Bench, clean_run, plain_read, process, tensor_files

SAMPLES, TOKENS = 32, 64  # of calibration
RANK = 16
LINEARS = "_proj"  # what a job on adapters reads of checkpoints and adapters, a regular expression over names


@dataclass(frozen=True)
class Place:
    """Models, and where a run may write."""

    paths: dict[str, Path]
    scratch: Path
    vocab: int

    @property
    def outputs(self) -> Path:
        return self.scratch / "outputs"

    def calibration(self) -> Path:
        """Random tokens, the same in each run."""
        data = self.scratch / "tokens.jsonl"
        ids = torch.randint(self.vocab, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
        data.write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in ids))
        return data


@dataclass(frozen=True)
class Job:
    """The arguments of a job, and what it reads: names of folders, and a pattern of the tensors in them."""

    arguments: list[str]
    reads: list[str]
    pattern: str = ""
    also: Path | None = None  # a folder made for it


def run(
    folder: Path,
    shape: str,
    layers: Sequence[int | None],
    repeat: int | None,
    adapters: Sequence[int],
    jobs: Sequence[str],
    runs: int,
    cold: bool,
    memory: str,
) -> None:
    """Measure whole jobs and reading what they read; append a row each and print it.

    Args:
        folder: where the models are made (kept) and the outputs written (removed, in a folder of their own).
        shape: a name of `models.SHAPES`.
        layers: numbers of decoder layers, None for the shape's own; a model each.
        repeat: how many of them hold data of their own, which the others repeat; None for all.
        adapters: numbers of fine-tuned adapters in one batch.
        jobs: names of `JOBS`.
        runs: repetitions; the median is reported.
        cold: drop the files from the page cache before each run.
        memory: the jobs' `--memory`.
    """
    size = SHAPES[shape]
    for number in layers:
        full = any(job.endswith("-full") for job in jobs)
        sizes = {"adapters": max(adapters), "rank": RANK}
        label, paths = prepare(folder, shape, number, repeat=repeat, finetuned=full, **sizes)
        bench = Bench(label, tensor_files(paths.values()), runs, cold)
        bench.measure("start Python and import torch", partial(process, [sys.executable, "-c", "import torch"]))
        with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
            place = Place(paths, Path(scratch), size.vocab)
            for name in jobs:
                for count in [0] if name.endswith("-full") else adapters:
                    _measure(bench, place, name, count, number or size.layers, memory, size.fp8)


def _measure(bench: Bench, place: Place, name: str, adapters: int, layers: int, memory: str, fp8: bool) -> None:
    job = JOBS[name](place, adapters)
    counted = f"{adapters} adapter{'s' * (adapters > 1)}" if adapters else "full checkpoint"
    title = f"{name.removesuffix('-full')}, {counted}"
    columns: dict[str, Any] = {"layers": layers, "adapters": adapters or "", "rank": RANK if adapters else ""}
    if fp8:
        columns["dtype"] = "fp8, adapters fp32"
    folders = [place.paths[read] for read in job.reads] + ([job.also] if job.also else [])
    floor = bench.measure(f"plain read: {title}", partial(plain_read, folders, job.pattern), **columns)
    command = [*SAFESHARD, *job.arguments, "--memory", memory, "--quiet"]
    bench.measure(title, partial(clean_run, place.outputs, command), floor=floor.seconds, **columns)


def _batch(place: Place, count: int, method: str, shared: dict[str, Any]) -> list[str]:
    file = place.scratch / f"{method}-{count}.yaml"
    jobs = [
        {"method": method, "adapter": str(place.paths[f"adapter-{i}"]), "output": str(place.outputs / str(i))}
        for i in range(count)
    ]
    file.write_text(json.dumps({"defaults": shared, "jobs": jobs}))  # JSON is YAML
    return ["batch", str(file)]


def _adapters(count: int) -> list[str]:
    return [f"adapter-{i}" for i in range(count)]


def _safemerge(place: Place, count: int) -> Job:
    names = {"aligned": "aligned", "unaligned": "unaligned", "safe_adapter": "safe"}
    shared = {option: str(place.paths[name]) for option, name in names.items()}
    return Job(_batch(place, count, "safemerge", shared), [*names.values(), *_adapters(count)], LINEARS)


def _safedelta(place: Place, count: int) -> Job:
    shared = {"aligned": str(place.paths["aligned"]), "calibration": str(place.calibration()), "samples": SAMPLES}
    return Job(_batch(place, count, "safedelta", {**shared, "strength": 1.0}), ["aligned", *_adapters(count)])


def _ridge(place: Place, count: int, penalties: Sequence[float] = (0.3,)) -> Job:
    """Adapters on saved Grams, which are made beforehand, each at every penalty."""
    grams = place.scratch / "grams"
    if not grams.exists():
        inputs = ["--aligned", str(place.paths["aligned"]), "--calibration", str(place.calibration())]
        options = ["--samples", str(SAMPLES), "--save", "grams", "--output", str(grams), "--quiet"]
        subprocess.run([*SAFESHARD, "calibrate", *inputs, *options], check=True)
    jobs = [
        {"method": "ridge", "adapter": str(place.paths[name]), "penalty": penalty,
         "output": str(place.outputs / f"{name}-{penalty}")}
        for name in _adapters(count)
        for penalty in penalties
    ]  # fmt: skip
    shared = {"aligned": str(place.paths["aligned"]), "factors": str(grams)}
    file = place.scratch / f"ridge-{count}-{len(penalties)}.yaml"
    file.write_text(json.dumps({"defaults": shared, "jobs": jobs}))
    return Job(["batch", str(file)], _adapters(count), also=grams)


def _full(place: Place, method: str, *options: str) -> list[str]:
    inputs = ["--aligned", str(place.paths["aligned"]), "--finetuned", str(place.paths["finetuned"])]
    return [method, *inputs, *options, "--output", str(place.outputs / "full")]


def _scale_full(place: Place, _: int) -> Job:
    return Job(_full(place, "scale", "--factor", "0.5"), ["aligned", "finetuned"])


def _safemerge_full(place: Place, _: int) -> Job:
    safe = ["--unaligned", str(place.paths["unaligned"]), "--safe", str(place.paths["finetuned-safe"])]
    return Job(_full(place, "safemerge", *safe), ["aligned", "unaligned", "finetuned", "finetuned-safe"])


def _safedelta_full(place: Place, _: int) -> Job:
    data = ["--calibration", str(place.calibration()), "--samples", str(SAMPLES), "--strength", "1"]
    return Job(_full(place, "safedelta", *data), ["aligned", "finetuned"])


JOBS: dict[str, Callable[[Place, int], Job]] = {
    "safemerge": _safemerge, "safedelta": _safedelta, "scale-full": _scale_full, "safemerge-full": _safemerge_full,
    "safedelta-full": _safedelta_full, "ridge": _ridge,
    "ridge-penalties": partial(_ridge, penalties=(0.03, 0.1, 0.3, 1.0)),
}  # fmt: skip
