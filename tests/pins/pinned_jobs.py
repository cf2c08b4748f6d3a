"""About sixty small jobs through the public functions, and the hashes of all that they write.

    python tests/pins/pinned_jobs.py

writes SHA256SUMS and DECISIONS.csv anew. That is done on purpose only: where a change means to change bytes, together
with the reason in its commit. Whatever means to change none must pass with the files as they are.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from pinned_inputs import randoms, write_inputs

from safeshard import streamer
from safeshard.manifests.errors import RunError

SUMS = Path(__file__).with_name("SHA256SUMS")
DECISIONS = Path(__file__).with_name("DECISIONS.csv")
NOT_PINNED = {"README.md", "manifest.json", "factors.json"}  # they name versions, times and places

# What may change the bits of a result: nothing (IEEE's own operations, one by one), the machine's linear algebra, or
# that of a forward pass in transformers too.
Rounding = Literal["elementwise", "algebra", "forward"]


@dataclass(frozen=True)
class Pinned:
    """A job: a public function, its options, and whether its first run fails at a number of writes."""

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rounding: Rounding = "algebra"
    interrupted_at: int | None = None
    after: str | None = None  # the job whose output it takes


def places(folder: str = "", *roles: str) -> dict[str, str]:
    """The checkpoints of a folder by role."""
    return {role: f"{folder}{role}" for role in roles}


GATE = places("", "aligned", "unaligned")
MERGE = GATE | {"adapter": "adapter", "safe_adapter": "safe-adapter", "threshold": 0.74}
FULL = GATE | places("", "finetuned", "safe") | {"threshold": 0.75}
PROJECT = {key: FULL[key] for key in ("aligned", "unaligned", "finetuned")}
DATA = {"calibration": "data.jsonl", "samples": 8, "percdamp": 0.1}
DELTA = {"aligned": "aligned", "adapter": "adapter", "block_size": 16, "strength": 600.0}
DENSE = {"aligned": "aligned", "finetuned": "finetuned", "block_size": 16, "strength": 40.0}
SAFE = {"calibration": "data.jsonl", "samples": 8}
SUBSPACE = GATE | SAFE | {"entropy": 0.5}
TIED = places("tied/", "aligned", "unaligned", "finetuned", "safe")
SHARDED = places("sharded/", "aligned", "unaligned", "finetuned", "safe")
FP32 = places("fp32/", "aligned", "unaligned", "finetuned", "safe")
IN_GPT2 = places("gpt2/", "aligned", "unaligned")

JOBS = (
    # Adapters.
    Pinned("merge-linear", "safemerge", MERGE),
    Pinned("merge-dare", "safemerge", MERGE | {"combine": "dare_linear", "density": 0.5, "seed": 3}),
    Pinned("merge-exact", "safemerge", MERGE | {"combine": "exact", "safe_adapter": "small-safe-adapter"}),
    Pinned("merge-svd", "safemerge", MERGE | {"combine": "svd", "rank": 6}),
    Pinned("merge-all", "safemerge", MERGE | {"threshold": 2.0, "weights": (0.5, 0.5)}, "elementwise"),
    Pinned("merge-none", "safemerge", MERGE | {"threshold": -2.0}, "elementwise"),
    Pinned("merge-bf16", "safemerge", MERGE | {"dtype": "bfloat16", "adapter": "half-adapter"}),
    Pinned("lora-threshold", "safelora", GATE | {"adapter": "adapter", "threshold": 0.74}),
    Pinned("lora-num-layers", "safelora", GATE | {"adapter": "adapter", "num_layers": 5}),
    Pinned("lora-uneven", "safelora", GATE | {"adapter": "uneven-adapter", "num_layers": 5, "dtype": "float32"}),
    Pinned("scale-adapter", "scale", {"aligned": "aligned", "adapter": "adapter", "factor": 0.7}, "elementwise"),
    Pinned("scale-uneven", "scale", {"aligned": "aligned", "adapter": "uneven-adapter", "factor": 0.3}, "elementwise"),
    Pinned("delta", "safedelta", DELTA | DATA, "forward"),
    Pinned("delta-exact", "safedelta", DELTA | DATA | {"sub_block": 1, "dtype": "float32"}, "forward"),
    Pinned("delta-rank", "safedelta", DELTA | DATA | {"rank": 5, "rest": "finetuned"}, "forward"),
    Pinned("delta-uneven", "safedelta", DELTA | DATA | {"adapter": "uneven-adapter", "rest": "finetuned"}, "forward"),
    Pinned("delta-merged", "safedelta", DELTA | DATA | {"output_format": "checkpoint"}, "forward"),
    Pinned("delta-rows-merged", "safedelta",
           DELTA | DATA | {"output_format": "checkpoint", "selection": "row", "aligned": "sharded/aligned"}, "forward"),
    Pinned("delta-alone", "safedelta", DELTA | DATA | {"compensate": False, "max_tokens": 6, "seed": 5}, "forward"),
    Pinned("gpt2-lora-adapter", "safelora", IN_GPT2 | {"adapter": "gpt2/adapter", "num_layers": 3}),
    Pinned("gpt2-delta-adapter", "safedelta",
           DELTA | DATA | {"aligned": "gpt2/aligned", "adapter": "gpt2/adapter"}, "forward"),
    Pinned("ridge", "ridge", SAFE | {"aligned": "aligned", "adapter": "adapter", "penalty": 0.2}, "forward"),
    Pinned("ridge-leak", "ridge", SAFE | {"aligned": "aligned", "adapter": "uneven-adapter", "leak": 0.05}, "forward"),
    Pinned("resta-adapter", "resta", GATE | {"adapter": "adapter", "gamma": 0.5}),
    Pinned("lssf", "lssf", SUBSPACE | {"adapter": "adapter", "safety_rank": 4}, "forward"),
    Pinned("lssf-merged", "lssf",
           SUBSPACE | {"adapter": "uneven-adapter", "output_format": "checkpoint", "alpha": 0.5}, "forward"),
    # Full checkpoints.
    Pinned("full-linear", "safemerge", FULL),
    Pinned("full-dare", "safemerge", FULL | {"combine": "dare_linear", "density": 0.5, "seed": 3}),
    Pinned("full-exact", "safemerge", FULL | {"combine": "exact"}),
    Pinned("full-svd", "safemerge", FULL | {"combine": "svd", "rank": 3}),
    Pinned("full-merge-all", "safemerge", FULL | SHARDED | {"threshold": 2.0}, "elementwise"),
    Pinned("full-merge-none", "safemerge", FULL | {"threshold": -2.0}, "elementwise"),
    Pinned("full-tied", "safemerge", FULL | TIED),
    Pinned("full-fp32", "safemerge", FULL | FP32),
    Pinned("full-lora-threshold", "safelora", PROJECT | {"threshold": 0.75}),
    Pinned("full-lora-sharded", "safelora", places("sharded/", *PROJECT) | {"num_layers": 6}),
    Pinned("full-lora-mixed", "safelora", PROJECT | {"finetuned": "sharded/finetuned", "num_layers": 3}),
    Pinned("full-lora-fp32", "safelora", places("fp32/", *PROJECT) | {"num_layers": 4, "dtype": "bfloat16"}),
    Pinned("full-ridge", "ridge", SAFE | places("", "aligned", "finetuned") | {"penalty": 1.0}, "forward"),
    Pinned("full-resta", "resta", PROJECT | {"gamma": 0.5, "density": 0.3, "seed": 3}, "elementwise"),
    Pinned("full-lssf", "lssf", SUBSPACE | {"finetuned": "finetuned"}, "forward"),
    Pinned("gpt2-lora", "safelora", IN_GPT2 | {"finetuned": "gpt2/finetuned", "num_layers": 3}),
    Pinned("full-scale", "scale", places("", "aligned", "finetuned") | {"factor": 0.3}, "elementwise"),
    Pinned("full-scale-tied", "scale", places("tied/", "aligned", "finetuned") | {"factor": 1.5}, "elementwise"),
    Pinned("full-scale-sharded", "scale", places("sharded/", "aligned", "finetuned") | {"factor": 1.0}, "elementwise"),
    Pinned("full-scale-cast", "scale",
           places("fp32/", "aligned", "finetuned") | {"factor": 0.7, "dtype": "bfloat16"}, "elementwise"),
    Pinned("full-delta", "safedelta", DENSE | DATA, "forward"),
    Pinned("full-delta-rows", "safedelta",
           DENSE | DATA | {"selection": "row", "rest": "finetuned", "sub_block": 1}, "forward"),
    Pinned("full-delta-fp32", "safedelta",
           DENSE | DATA | places("fp32/", "aligned", "finetuned") | {"strength": 2.0}, "forward"),
    Pinned("full-delta-tied", "safedelta", DENSE | DATA | places("tied/", "aligned", "finetuned"), "forward"),
    Pinned("gpt2-delta", "safedelta",
           DENSE | DATA | places("gpt2/", "aligned", "finetuned") | {"strength": 1.0}, "forward"),
    # Saved factors, scores, batches, and what goes on after a failure.
    Pinned("factors", "calibrate", DATA | {"aligned": "aligned"}, "forward"),
    Pinned("factors-fp32", "calibrate", DATA | {"aligned": "sharded/aligned", "dtype": "float32"}, "forward"),
    Pinned("delta-saved", "safedelta", DELTA | {"factors": "factors"}, "forward", after="factors"),
    Pinned("full-delta-saved", "safedelta", DENSE | {"factors": "factors"}, "forward", after="factors"),
    Pinned("scores.csv", "score", GATE | {"adapter": ["adapter", "other-adapter"], "finetuned": "finetuned"}),
    Pinned("scores.json", "score", GATE | {"adapter": "uneven-adapter", "finetuned": ["sharded/finetuned", "safe"]}),
    Pinned("batch", "batch", rounding="forward"),
    Pinned("resumed-merge", "safemerge", MERGE, interrupted_at=20),
    Pinned("resumed-lora", "safelora", places("sharded/", *PROJECT) | {"num_layers": 6}, interrupted_at=14),
    Pinned("resumed-delta", "safedelta", DENSE | DATA, "forward", interrupted_at=10),
    Pinned("resumed-factors", "calibrate", DATA | {"aligned": "aligned"}, "forward", interrupted_at=14),
)  # fmt: skip

BATCH = """\
defaults: {aligned: aligned, unaligned: unaligned, safe_adapter: safe-adapter, safe: safe, block_size: 16}
jobs:
  - method: safemerge
    matrix: {adapter: [adapter, other-adapter], combine: [linear, exact]}
    threshold: 0.74
    safe: null
    output: batch/{adapter}-{combine}
  - {method: safelora, finetuned: finetuned, num_layers: 6, output: batch/lora}
  - {method: safelora, adapter: half-adapter, threshold: 0.74, output: batch/lora-adapter}
  - {method: scale, aligned: sharded/aligned, finetuned: sharded/finetuned, factor: 0.5, output: batch/scale}
  - method: safedelta
    adapter: adapter
    matrix: {strength: [200, 1000]}
    calibration: data.jsonl
    samples: 8
    percdamp: 0.1
    output: batch/delta-{strength}
"""


def run(job: Pinned) -> None:
    """Run a job in the current folder, where its inputs lie; its output is the file or folder of its name there."""
    if job.function == "batch":
        Path("jobs.yaml").write_text(BATCH)
        streamer.batch("jobs.yaml", device="cpu", quiet=True)
        return
    function = getattr(streamer, job.function)
    options = {**job.options, "output": job.name, "device": "cpu", "quiet": True}
    if job.interrupted_at is not None:
        with suppress(RunError), full_disk(job.interrupted_at):
            function(**options)
            raise AssertionError(f"{job.name} was to fail at write {job.interrupted_at}")
        journal = Path(f"{job.name}.partial/journal.jsonl").read_text()
        assert '"kind":"tensor"' in journal or '"kind":"layer"' in journal, f"{job.name} had finished nothing"
    function(**options)


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """The write number `at`, from 1 on, fails for want of space; those after it do not."""
    write, calls = os.pwrite, []

    def failing(*args: Any) -> int:
        calls.append(args)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    with mock.patch("os.pwrite", failing):
        yield


def sums(place: Path) -> dict[str, str]:
    """Path -> SHA-256 of the pinned files of an output, or of one file; paths start with the output's name."""
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return {
        p.relative_to(place.parent).as_posix(): sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name not in NOT_PINNED
    }


def decisions(place: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(output, module) -> its decision, and its cosine to five places where it has one."""
    return {
        (file.parent.relative_to(place.parent).as_posix(), entry["name"]): (
            entry["decision"],
            f"{entry['cosine']:.5f}" if "cosine" in entry else "",
        )
        for file in sorted(place.rglob("manifest.json"))
        for entry in json.loads(file.read_text())["modules"]
    }


def machine() -> dict[str, str]:
    """All that results depend on besides the program: versions, the processor as torch sees it, and bits it computes.

    Processors of one capability may differ still, hence the bits.
    """
    draw, results = randoms(0), []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a, b = draw(40, 24).to(dtype), draw(24, 16).to(dtype)
        results += [a @ b, torch.nn.functional.silu(a), a.softmax(-1)]
        query = draw(1, 2, 11, 12).to(dtype)
        results.append(torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True))
        if dtype != torch.bfloat16:
            gram = a.T @ a + torch.eye(24, dtype=dtype)
            results += [torch.linalg.cholesky(gram), torch.linalg.inv(gram), torch.linalg.eigh(gram)[1]]
            results += [torch.linalg.svd(a, full_matrices=False)[0], torch.linalg.qr(a)[0], (a * a).sum()]
    data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in results)
    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": version("transformers"),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": sha256(data).hexdigest()[:16],
    }


def read_sums() -> tuple[dict[str, str], dict[str, str]]:
    """The machine that SHA256SUMS was written on, and its hashes by path."""
    lines = SUMS.read_text().splitlines()
    heads = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    return heads, {path: digest for digest, path in (line.split("  ", 1) for line in lines if line[:1] != "#")}


def read_decisions() -> dict[tuple[str, str], tuple[str, str]]:
    """As `decisions`, from DECISIONS.csv."""
    with DECISIONS.open(newline="") as file:
        return {(output, module): (decision, cosine) for output, module, decision, cosine in csv.reader(file)}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs(Path("inputs"))
        lines = [f"# {key}: {value}" for key, value in machine().items()]
        lines += [f"{digest}  {path}" for path, digest in sums(Path("inputs").absolute()).items()]
        os.chdir("inputs")
        rows: list[tuple[str, ...]] = []
        for job in JOBS:
            run(job)
            place = Path(job.name).absolute()
            lines += [f"{digest}  {path}" for path, digest in sums(place).items()]
            rows += [(*key, *value) for key, value in decisions(place).items()]
        os.chdir("/")
    SUMS.write_text("\n".join(lines) + "\n")
    with DECISIONS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
