"""What safety costs: hashing and syncing, as a share of a job that edits and writes a checkpoint."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path

from safeshard.bench.io import PIECE, write
from safeshard.bench.measure import SAFESHARD, Bench, Sample, clean_run, file_bytes, tensor_files
from safeshard.bench.models import SHAPES, make_models
from safeshard.manifests.hashing import hash_tensor_region


def run(folder: Path, shape: str, layers: int | None, runs: int, cold: bool) -> None:
    """Measure `scale` on a full checkpoint, then hashing and syncing the bytes of its output; append a row each.

    The job's row holds its stages; hashing and syncing on their own are single-threaded, so their shares of the job
    bound what safety costs.
    """
    size = SHAPES[shape]
    layers = layers or size.layers
    paths = make_models(folder, size, layers=layers, adapters=1, rank=16, finetuned=True)
    inputs = [paths["aligned"], paths["finetuned"]]
    bench = Bench(f"{shape} x{layers} layers", tensor_files(inputs), runs, cold, file="safety")
    written = file_bytes(inputs[:1])
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        outputs = Path(scratch, "outputs")
        command = [*SAFESHARD, "scale", "--aligned", str(inputs[0]), "--finetuned", str(inputs[1]), "--factor", "0.5"]
        command += ["--output", str(outputs / "full"), "--quiet"]
        job = bench.measure(
            "scale, full checkpoint", partial(clean_run, outputs, command), file_bytes(inputs) + written
        )
    hashed = bench.measure("hash the output's bytes", partial(_hash, tensor_files(inputs[:1])), written)
    synced = bench.measure("sync the output's bytes", partial(_sync, folder, written), written)
    print(f"at most {100 * hashed / job:.0f} % of the job hashes, {100 * synced / job:.0f} % syncs")


def _hash(files: list[Path]) -> Sample:
    start = time.perf_counter()
    for file in files:
        with file.open("rb") as opened:
            hash_tensor_region(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
    return Sample(time.perf_counter() - start, PIECE)


def _sync(folder: Path, nbytes: int) -> Sample:
    sample = write(folder, nbytes)
    return Sample(sample.stages["sync"], PIECE)
