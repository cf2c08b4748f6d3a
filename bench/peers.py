"""The same job by mergekit and by PEFT, on the same machine in the same run, with the outputs compared."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from safeshard.bench.measure import SAFESHARD, Bench, clean_run, file_bytes, tensor_files
from safeshard.bench.models import SHAPES, make_models
from safeshard.manifests.errors import Offence, RequestError

FACTOR = 0.5  # exact in bf16, so that both weigh alike
FLAGS = ("--lazy-unpickle", "--low-cpu-memory", "--async-write", "--no-copy-tokenizer", "--no-write-model-card")
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
aligned, adapter, safe, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(aligned, torch_dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter, "tuned", autocast_adapter_dtype=False)
model.load_adapter(safe, "safe", autocast_adapter_dtype=False)
model.add_weighted_adapter(["tuned", "safe"], [0.8, 0.2], "merged", combination_type="linear")
model.save_pretrained(output, selected_adapters=["merged"])
"""


def run(folder: Path, shape: str, layers: int | None, runs: int, cold: bool, mergekit: str | None) -> None:
    """Measure both pairs; append a row each and print it, with the largest difference of the outputs.

    Args:
        mergekit: the executable `mergekit-yaml`; None looks for it beside Python and on the PATH.

    Raises:
        RequestError: mergekit is not there.
    """
    executable = mergekit or shutil.which(str(Path(sys.executable).with_name("mergekit-yaml"))) or shutil.which(
        "mergekit-yaml"
    )  # fmt: skip
    if executable is None:
        remedy = "python -m venv mergekit && mergekit/bin/pip install mergekit; --mergekit mergekit/bin/mergekit-yaml"
        raise RequestError(Offence("--mergekit", "", "the executable mergekit-yaml", "none on the PATH", remedy))
    size = SHAPES[shape]
    layers = layers or size.layers
    paths = make_models(folder, size, layers=layers, adapters=1, rank=16, finetuned=True)
    bench = Bench(f"{shape} x{layers} layers", tensor_files(paths.values()), runs, cold, file="peers")
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        _full(bench, paths, Path(scratch), executable)
        _adapters(bench, paths, Path(scratch))


def _full(bench: Bench, paths: dict[str, Path], scratch: Path, executable: str) -> None:
    """W + (F - W) / 2 by both: mergekit's linear merge with weights 1/2, 1/2, and `scale --factor 0.5`."""
    config = scratch / "linear.yaml"
    models = [{"model": str(paths[n]), "parameters": {"weight": FACTOR}} for n in ("aligned", "finetuned")]
    config.write_text(
        json.dumps(
            {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "bfloat16"}
        )
    )
    nbytes = file_bytes([paths["aligned"], paths["finetuned"]])
    theirs, ours = scratch / "mergekit", scratch / "scale"
    command = [executable, str(config), str(theirs / "out"), *FLAGS]
    peer = bench.measure("mergekit, linear of two checkpoints", partial(clean_run, theirs, command), nbytes)
    inputs = ["--aligned", str(paths["aligned"]), "--finetuned", str(paths["finetuned"])]
    command = [*SAFESHARD, "scale", *inputs, "--factor", str(FACTOR), "--output", str(ours / "out"), "--quiet"]
    own = bench.measure("safeshard scale of two checkpoints", partial(clean_run, ours, command), nbytes, peer)
    print(f"mergekit takes {peer / own:.1f} times as long; largest relative difference {_difference(theirs, ours):.2g}")


def _adapters(bench: Bench, paths: dict[str, Path], scratch: Path) -> None:
    """PEFT's `linear` of two adapters, and SafeMERGE with a gate that always merges: ours also computes the gate."""
    theirs, ours = scratch / "peft", scratch / "safemerge"
    named = [str(paths[name]) for name in ("aligned", "adapter-0", "safe")]
    read = file_bytes([paths[name] for name in ("aligned", "adapter-0", "safe")])
    command = [sys.executable, "-c", PEFT, *named, str(theirs / "out")]
    peer = bench.measure("PEFT, add_weighted_adapter linear", partial(clean_run, theirs, command), read)
    options = [
        x for role, name in zip(("aligned", "adapter", "safe-adapter"), named, strict=True) for x in (f"--{role}", name)
    ]
    options += ["--unaligned", str(paths["unaligned"]), "--threshold", "2", "--weights", "0.8", "0.2"]
    command = [*SAFESHARD, "safemerge", *options, "--output", str(ours / "out"), "--quiet"]
    read += file_bytes([paths["unaligned"]])
    own = bench.measure("safeshard safemerge, gate and linear", partial(clean_run, ours, command), read, peer)
    print(f"PEFT takes {peer / own:.1f} times as long; largest relative difference {_difference(theirs, ours):.2g}")


def _difference(theirs: Path, ours: Path) -> float:
    """The largest difference of two outputs' tensors, relative to the largest entry of the tensor."""
    left, right = (
        {k: v for f in sorted(p.rglob("*.safetensors")) for k, v in load_file(f).items()} for p in (theirs, ours)
    )
    if left.keys() != right.keys():
        raise SystemExit(f"the outputs hold other tensors: {sorted(left.keys() ^ right.keys())[:4]}")
    worst = 0.0
    for name, tensor in left.items():
        a, b = tensor.float(), right[name].float()
        worst = max(worst, float((a - b).abs().max() / torch.clamp_min(a.abs().max(), 1e-30)))
    return worst
