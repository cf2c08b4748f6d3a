"""The same job by mergekit and by PEFT, on the same machine in the same run, with the outputs compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from safetensors import safe_open

from safeshard.bench.inputs.models import prepare
from safeshard.bench.machine.measure import SAFESHARD, Bench, Sample, clean_run, tensor_bytes, tensor_files
from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.streamer.extras import require

FACTOR = 0.5  # exact in bf16, so that both weigh alike
FLAGS = ("--async-write", "--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
PEERS = ("mergekit", "peft")
# The largest difference allowed, relative to the largest entry of the tensor: one rounding of the output's dtype.
TOLERANCE = {"BF16": 2.0**-8, "F32": 2.0**-20}
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
aligned, adapter, safe, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter, "tuned")
model.load_adapter(safe, "safe")
model.add_weighted_adapter(["tuned", "safe"], [0.8, 0.2], "merged", combination_type="linear")
model.save_pretrained(output, selected_adapters=["merged"])
"""


def run(
    folder: Path, shape: str, layers: int | None, runs: int, cold: bool, peers: list[str], mergekit: str | None
) -> None:
    """Measure each peer and safeshard on its job; append a row each and print it.

    Args:
        peers: some of PEERS.
        mergekit: the executable `mergekit-yaml`; None looks for it beside Python and on the PATH.

    Raises:
        RequestError: a peer is not there.
        RunError: the outputs differ by more than TOLERANCE.
    """
    executable = _executable(mergekit) if "mergekit" in peers else ""
    if "peft" in peers:
        require("peft", "bench")
    label, paths = prepare(folder, shape, layers, finetuned="mergekit" in peers)
    bench = Bench(label, tensor_files(paths.values()), runs, cold, file="peers")
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as scratch:
        if "mergekit" in peers:
            _full(bench, paths, Path(scratch), executable)
        if "peft" in peers:
            _adapters(bench, paths, Path(scratch))


def _executable(given: str | None) -> str:
    beside = Path(sys.executable).with_name("mergekit-yaml")
    found = shutil.which(given) if given else shutil.which(beside) or shutil.which("mergekit-yaml")
    if found is None:
        remedy = "python -m venv mergekit && mergekit/bin/pip install mergekit; --mergekit mergekit/bin/mergekit-yaml"
        raise RequestError(Offence("--mergekit", "", "the executable mergekit-yaml", given or "none", remedy))
    return found


def _full(bench: Bench, paths: dict[str, Path], scratch: Path, executable: str) -> None:
    """W + (F - W) / 2 by both: mergekit's linear merge with weights 1/2, 1/2, and `scale --factor 0.5`."""
    config = scratch / "linear.yaml"
    models = [{"model": str(paths[n]), "parameters": {"weight": FACTOR}} for n in ("aligned", "finetuned")]
    merge = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "bfloat16"}
    config.write_text(json.dumps(merge))  # JSON is YAML
    theirs, ours = scratch / "mergekit", scratch / "scale"
    cores = str(len(os.sched_getaffinity(0)))
    command = [executable, str(config), str(theirs / "out"), *FLAGS, "--num-threads", cores, "--write-threads", cores]
    read = [paths["aligned"], paths["finetuned"]]
    name = f"mergekit {_mergekit_version(executable)}"
    peer = bench.measure("linear merge of two checkpoints", partial(_peer, theirs, command, read), backend=name)
    inputs = ["--aligned", str(paths["aligned"]), "--finetuned", str(paths["finetuned"])]
    command = [*SAFESHARD, "scale", *inputs, "--factor", str(FACTOR), "--output", str(ours / "out"), "--quiet"]
    clean_run(ours, command)
    compare(theirs, ours)
    bench.measure(
        "linear merge of two checkpoints", partial(clean_run, ours, command), against=(name, peer), backend="safeshard"
    )


def _adapters(bench: Bench, paths: dict[str, Path], scratch: Path) -> None:
    """PEFT's `linear` of two adapters, and SafeMERGE with a gate that always merges: ours also computes the gate."""
    theirs, ours = scratch / "peft", scratch / "safemerge"
    read = [paths[name] for name in ("aligned", "adapter-0", "safe")]
    command = [sys.executable, "-c", PEFT, *map(str, read), str(theirs / "out")]
    name = f"PEFT {version('peft')}"
    peer = bench.measure("linear merge of two adapters", partial(_peer, theirs, command, read), backend=name)
    options = [
        text for role, path in zip(("--aligned", "--adapter", "--safe-adapter"), read, strict=True)
        for text in (role, str(path))
    ]  # fmt: skip
    options += ["--unaligned", str(paths["unaligned"]), "--threshold", "2", "--weights", "0.8", "0.2"]
    command = [*SAFESHARD, "safemerge", *options, "--output", str(ours / "out"), "--quiet"]
    clean_run(ours, command)
    compare(theirs, ours)
    bench.measure(
        "linear merge of two adapters", partial(clean_run, ours, command), against=(name, peer),
        backend="safeshard, with the gate",
    )  # fmt: skip


def _peer(outputs: Path, command: list[str], read: list[Path]) -> Sample:
    return replace(clean_run(outputs, command), nbytes=tensor_bytes([*read, outputs]))


def _mergekit_version(executable: str) -> str:
    python = Path(executable).with_name("python")
    code = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def compare(theirs: Path, ours: Path) -> None:
    """Compare all tensors of two outputs, one by one.

    Raises:
        RunError: they hold other tensors, or values that differ by more than TOLERANCE.
    """
    left, right = _places(theirs), _places(ours)
    if left.keys() != right.keys():
        raise RunError(f"the outputs hold other tensors: {sorted(left.keys() ^ right.keys())[:4]}")
    for name in left:
        with safe_open(left[name], "pt") as a, safe_open(right[name], "pt") as b:
            dtypes = [file.get_slice(name).get_dtype() for file in (a, b)]
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
        if x.shape != y.shape or dtypes[0] != dtypes[1]:
            raise RunError(f"{name}: {dtypes[0]} {[*x.shape]} by the peer, {dtypes[1]} {[*y.shape]} by safeshard")
        difference, limit = float((x - y).abs().max()), TOLERANCE[dtypes[0]] * float(x.abs().max())
        if not difference <= limit:  # NaN is a difference
            raise RunError(f"{name}: the outputs differ by {difference:.3g}, more than {limit:.3g}")


def _places(folder: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for path in tensor_files([folder]):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places
