"""Whole jobs as a user runs them: a process each, timed from outside, against a process that reads the same bytes."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safeshard.bench.measure import SAFESHARD, Bench, clean_run, file_bytes, process, reader, tensor_files
from safeshard.bench.models import SHAPES, make_models

SAMPLES, TOKENS = 32, 64  # of calibration
Command = tuple[list[str], list[str]]  # the arguments, and the names of the folders that the job reads


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


def run(
    folder: Path,
    shape: str,
    layers: int | None,
    adapters: Sequence[int],
    jobs: Sequence[str],
    runs: int,
    cold: bool,
    memory: str,
) -> None:
    """Measure reading and whole jobs; append a row each and print it.

    Args:
        folder: where the models are made (kept) and the outputs written (removed, in a folder of their own).
        shape: a name of `models.SHAPES`.
        layers: decoder layers, or None for the shape's own.
        adapters: numbers of fine-tuned adapters in one batch.
        jobs: names of `JOBS`.
        runs: repetitions; the median is reported.
        cold: drop the files from the page cache before each run.
        memory: the jobs' `--memory`.
    """
    size = SHAPES[shape]
    layers = layers or size.layers
    full = any(job.endswith("-full") for job in jobs)
    paths = make_models(folder, size, layers=layers, adapters=max(adapters), rank=16, finetuned=full)
    bench = Bench(f"{shape} x{layers} layers", tensor_files(paths.values()), runs, cold)
    bench.measure("start Python and import torch", partial(process, [sys.executable, "-c", "import torch"]))
    floors: dict[tuple[str, ...], float] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        place = Place(paths, Path(scratch), size.vocab)
        for name in jobs:
            for count in [1] if name.endswith("-full") else adapters:
                arguments, names = JOBS[name](place, count)
                read = [paths[n] for n in names]
                checkpoints = tuple(n for n in names if "adapter" not in n and n != "safe")
                if checkpoints not in floors:
                    folders = [paths[n] for n in checkpoints]
                    what = f"read {', '.join(checkpoints)} in a process"
                    floors[checkpoints] = bench.measure(what, partial(process, reader(folders)), file_bytes(folders))
                command = [*SAFESHARD, *arguments, "--memory", memory, "--quiet"]
                what = name if name.endswith("-full") else f"{name}, {count} adapter{'s' * (count > 1)}"
                job = partial(clean_run, place.outputs, command)
                counts = {"layers": layers, "adapters": count, "rank": 16}
                bench.measure(what, job, file_bytes(read), floors[checkpoints], **counts)


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


def _safemerge(place: Place, count: int) -> Command:
    names = {"aligned": "aligned", "unaligned": "unaligned", "safe_adapter": "safe"}
    shared = {option: str(place.paths[name]) for option, name in names.items()}
    return _batch(place, count, "safemerge", shared), [*names.values(), *_adapters(count)]


def _safedelta(place: Place, count: int) -> Command:
    shared = {"aligned": str(place.paths["aligned"]), "calibration": str(place.calibration()), "samples": SAMPLES}
    return _batch(place, count, "safedelta", {**shared, "strength": 1.0}), ["aligned", *_adapters(count)]


def _full(place: Place, method: str, *options: str) -> list[str]:
    inputs = ["--aligned", str(place.paths["aligned"]), "--finetuned", str(place.paths["finetuned"])]
    return [method, *inputs, *options, "--output", str(place.outputs / "full")]


def _scale_full(place: Place, _: int) -> Command:
    return _full(place, "scale", "--factor", "0.5"), ["aligned", "finetuned"]


def _safemerge_full(place: Place, _: int) -> Command:
    safe = ["--unaligned", str(place.paths["unaligned"]), "--safe", str(place.paths["finetuned-safe"])]
    return _full(place, "safemerge", *safe), ["aligned", "unaligned", "finetuned", "finetuned-safe"]


def _safedelta_full(place: Place, _: int) -> Command:
    data = ["--calibration", str(place.calibration()), "--samples", str(SAMPLES), "--strength", "1"]
    return _full(place, "safedelta", *data), ["aligned", "finetuned"]


JOBS: dict[str, Callable[[Place, int], Command]] = {
    "safemerge": _safemerge, "safedelta": _safedelta, "scale-full": _scale_full, "safemerge-full": _safemerge_full,
    "safedelta-full": _safedelta_full,
}  # fmt: skip
