"""What it costs that nothing is lost: hashing and syncing, each alone, beside a job that writes a checkpoint."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path

from safeshard.bench.inputs.models import prepare
from safeshard.bench.machine.io import write
from safeshard.bench.machine.measure import SAFESHARD, Bench, Sample, clean_run, tensor_files
from safeshard.manifests.hashing import hash_tensor_region


def run(folder: Path, shape: str, layers: int | None, runs: int, cold: bool) -> None:
    """Measure `scale` on a full checkpoint, then hashing and syncing the bytes of its output; append a row each.

    Hashing and syncing on their own run on one thread and overlap with nothing, so that they bound what it costs.
    """
    label, paths = prepare(folder, shape, layers, finetuned=True)
    inputs = [paths["aligned"], paths["finetuned"]]
    output = tensor_files(inputs[:1])  # the output holds as many bytes
    bench = Bench(label, tensor_files(inputs), runs, cold, file="durability")
    name = "scale, full checkpoint"
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        outputs = Path(scratch, "outputs")
        command = [*SAFESHARD, "scale", "--aligned", str(inputs[0]), "--finetuned", str(inputs[1]), "--factor", "0.5"]
        command += ["--output", str(outputs / "full"), "--quiet"]
        job = bench.measure(name, partial(clean_run, outputs, command))
    bench.measure("hash the bytes of its output", partial(_hash, output), against=(name, job))
    size = sum(file.stat().st_size for file in output)
    bench.measure("sync the bytes of its output", partial(_sync, folder, size), against=(name, job))


def _hash(files: list[Path]) -> Sample:
    for file in files:  # a job hashes what it has just written, which is in the page cache
        file.read_bytes()
    start = time.perf_counter()
    for file in files:
        with file.open("rb") as opened:
            hash_tensor_region(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
    return Sample(time.perf_counter() - start, nbytes=sum(file.stat().st_size for file in files))


def _sync(folder: Path, nbytes: int) -> Sample:
    return Sample(write(folder, nbytes).stages["sync"], nbytes=nbytes)
