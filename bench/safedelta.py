"""Safe Delta measured: one weight on its own, and whole jobs that share a calibration."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from safeshard.bench.models import SHAPES, make_models
from safeshard.bench.pipeline import Bench, clean_run
from safeshard.bench.rows import append
from safeshard.kernels.compensation import safe_delta_dense
from safeshard.kernels.factor import safety_factor

ROWS, COLUMNS = 2048, 4096  # the weight that the published code was timed with
SAMPLES, TOKENS = 32, 64


def run_weight(runs: int, threads: int) -> None:
    """Time factor, selection and compensation of one full delta (2048 x 4096, fp32); append a row and print it.

    A job's worker computes on one thread, so that results do not depend on how many there are.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(ROWS, COLUMNS, generator=generator) * 0.01
    inputs = torch.randn(2 * COLUMNS, COLUMNS, generator=generator)
    gram = inputs.T @ inputs
    del inputs
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        safe_delta_dense(delta, safety_factor(gram), 1.0)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[1:]
    median, peak = statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    nbytes = 4 * (gram.numel() + 2 * delta.numel())
    what = "one weight: factor, selection, compensation" + (f", {threads} threads" if threads > 1 else "")
    append("safedelta", {
        "what": what, "shape": f"{ROWS} x {COLUMNS}", "dtype": "fp32",
        "median_s": f"{median:.3f}", "min_s": f"{min(seconds):.3f}", "max_s": f"{max(seconds):.3f}", "runs": runs,
        "bytes": nbytes, "GB_per_s": f"{nbytes / median / 1e9:.2f}", "peak_rss_bytes": peak, "cache": "in memory",
    })  # fmt: skip
    print(
        f"one weight {ROWS} x {COLUMNS}, {threads} threads: {median:.2f} s ({min(seconds):.2f}-{max(seconds):.2f})",
        flush=True,
    )


def run_jobs(folder: Path, shape: str, layers: int | None, counts: list[int], runs: int) -> None:
    """Time whole processes of Safe Delta with each number of LoRA jobs in one batch; append a row each and print it."""
    size = SHAPES[shape]
    layers = layers or size.layers
    folder.mkdir(parents=True, exist_ok=True)
    paths = make_models(folder, size, layers=layers, adapters=max(counts), rank=16, finetuned=False)
    ids = torch.randint(size.vocab, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    bench = Bench(f"{shape} x{layers} layers, {SAMPLES} x {TOKENS} tokens", [], runs, cold=False, file="safedelta")
    nbytes = sum(file.stat().st_size for file in paths["aligned"].glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        data, outputs = Path(scratch, "tokens.jsonl"), Path(scratch, "outputs")
        data.write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in ids))
        defaults = {"aligned": str(paths["aligned"]), "calibration": str(data), "samples": SAMPLES, "strength": 1.0}
        for count in counts:
            jobs = Path(scratch, f"jobs-{count}.yaml")
            entries = [
                {"method": "safedelta", "adapter": str(paths[f"adapter-{i}"]), "output": str(outputs / str(i))}
                for i in range(count)
            ]
            jobs.write_text(json.dumps({"defaults": defaults, "jobs": entries}))  # JSON is YAML
            command = [sys.executable, "-m", "safeshard.streamer.cli", "batch", str(jobs), "--memory", "8GiB"]
            what = f"safedelta, {count} LoRA job{'s' * (count > 1)}"
            bench.measure(what, partial(clean_run, outputs, command), nbytes)
