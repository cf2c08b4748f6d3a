"""What it costs to cut a batch: the processor's seconds of all parts and of `finish`, beside those of one process."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safeshard.bench.inputs.models import SHAPES, prepare
from safeshard.bench.machine.measure import SAFESHARD, Bench, Sample, clean_run, process, tensor_files

ADAPTERS, RANK = 8, 16
EMPTY = 10_000  # parts: far more than there are steps, so that the last one starts, plans and ends


def run(folder: Path, shape: str, layers: int | None, repeat: int | None, count: int, runs: int) -> None:
    """Measure a batch of adapters and a full checkpoint, whole and in `count` parts one after the other.

    Args:
        folder: where the models are made (kept) and the outputs written (removed, in a folder of their own).
        shape: a name of `models.SHAPES`.
        layers: number of decoder layers, None for the shape's own.
        repeat: how many of them hold data of their own, which the others repeat: a shard a layer. None: as few shards
            as 5 GiB allow, so that a cut may go through one, which `finish` then copies.
        runs: repetitions; the median is reported.
    """
    label, paths = prepare(folder, shape, layers, repeat=repeat, finetuned=True, adapters=ADAPTERS, rank=RANK)
    bench = Bench(label, tensor_files(paths.values()), runs, cold=False, file="parts")
    columns: dict[str, Any] = {"layers": layers or SHAPES[shape].layers}
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        outputs = Path(scratch) / "outputs"
        for what, jobs in _batches(paths, outputs).items():
            file = Path(scratch) / "jobs.yaml"
            file.write_text(json.dumps(jobs))  # JSON is YAML
            command = [*SAFESHARD, "batch", str(file), "--quiet"]
            whole = bench.measure(f"{what}, one process", partial(clean_run, outputs, command), **columns)
            empty = [*command, "--part", f"{EMPTY}/{EMPTY}"]
            bench.measure(f"{what}, a part with nothing to do", partial(_nothing, outputs, empty), **columns)
            bench.measure(
                f"{what}, {count} parts and finish", partial(_in_parts, outputs, file, count),
                against=("one process", whole), **columns,
            )  # fmt: skip


def _batches(paths: Mapping[str, Path], outputs: Path) -> dict[str, dict[str, Any]]:
    places = {name: str(path) for name, path in paths.items()}
    pair = {"aligned": places["aligned"], "unaligned": places["unaligned"]}
    method = {"method": "safemerge"}
    adapters = [method | {"adapter": places[f"adapter-{i}"], "output": str(outputs / str(i))} for i in range(ADAPTERS)]
    full = method | {
        "finetuned": places["finetuned"],
        "safe": places["finetuned-safe"],
        "output": str(outputs / "full"),
    }
    return {
        f"safemerge, {ADAPTERS} adapters": {"defaults": {**pair, "safe_adapter": places["safe"]}, "jobs": adapters},
        "safemerge, full checkpoint": {"defaults": pair, "jobs": [full]},
    }


def _nothing(outputs: Path, command: list[str]) -> Sample:
    """A part with nothing to do: what every part costs by itself. No rate is made of it."""
    sample = clean_run(outputs, command)
    return replace(sample, stages={"processor": sample.processor})


def _in_parts(outputs: Path, file: Path, count: int) -> Sample:
    """All parts one after the other, and `finish`: the sum of their times, and the highest peak."""
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    commands = [["batch", str(file), "--part", f"{number}/{count}"] for number in range(1, count + 1)]
    samples = [process([*SAFESHARD, *command, "--quiet"]) for command in (*commands, ["finish", str(file), "--quiet"])]
    processor = sum(sample.processor for sample in samples)
    seconds, peak = sum(sample.seconds for sample in samples), max(sample.peak for sample in samples)
    return replace(samples[0], seconds=seconds, peak=peak, processor=processor, stages={"processor": processor})
