"""Safe Delta's runs: many jobs on one calibration, memory, and resuming after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.manifests.errors import RequestError
from safeshard.streamer import batch, verify
from safeshard.streamer.calibration import factors
from safeshard.streamer.cli.app import main
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.options import RunOptions
from safeshard.streamer.run.calibrated import arithmetic_bytes, host_bytes
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.run.runner import plan_jobs


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each calibration run."""
    runs: list[int] = []
    original = factors.calibrate

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(factors, "calibrate", counted)
    return runs


def test_a_batch_calibrates_once(llama: Any, calibrations: list[int]) -> None:
    """Strengths, selections and adapters share the run, and each output has the bytes of a run of its own."""
    other = llama.make_adapter("other", seed=5, target_modules=["q_proj", "up_proj"])
    shared = {"aligned", "calibration", "samples", "percdamp", "block_size", "sub_block", "dtype"}
    variants: list[dict[str, Any]] = [
        {"strength": 0.5},
        {"strength": 2.0},
        {"adapter": str(other), "strength": 2.0},
        {"output_format": "checkpoint", "selection": "row"},
        {"finetuned": str(llama.root / "finetuned"), "adapter": None},
        {"strength": 2.0, "compensate": False, "rank": 5},
    ]
    options = llama.options("unused")
    jobs = [
        {"method": "safedelta", "output": str(llama.root / f"batch-{i}"), "adapter": str(llama.adapter)} | variant
        for i, variant in enumerate(variants)
    ]
    file = llama.root / "jobs.yaml"
    defaults = {key: str(v) if isinstance(v, Path) else v for key, v in options.items() if key in shared}
    file.write_text(json.dumps({"defaults": defaults, "jobs": jobs}))
    batch(file, quiet=True)
    assert len(calibrations) == 1
    for i, variant in enumerate(variants):
        llama.run(f"single-{i}", **{key: value for key, value in variant.items() if value is not None})
        assert llama.weights(f"batch-{i}") == llama.weights(f"single-{i}"), variant
    assert len(calibrations) == 1 + len(variants)


def test_memory_and_spilling_change_no_byte(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that just suffices: hidden states go to a file, and what is in flight stays below it."""
    tuned = llama.root / "finetuned"
    result, _ = llama.run("roomy", finetuned=tuned, strength=2.0, memory="1GiB")
    with pytest.raises(RequestError, match="at least") as refused:
        llama.run("refused", finetuned=tuned, strength=2.0, memory="64KiB")
    need = max(int(o.expected.split()[2]) for o in refused.value.offences)
    budgets = []
    original = factors.calibrate

    def watched(*args: Any, **kwargs: Any) -> Any:
        budgets.append(kwargs["budget_bytes"])
        return original(*args, **kwargs)

    monkeypatch.setattr(factors, "calibrate", watched)
    result, _ = llama.run("tight", finetuned=tuned, strength=2.0, memory=need)
    assert budgets[0] < 1 << 14
    assert llama.weights("tight") == llama.weights("roomy")
    assert result.manifest is not None
    assert (result.manifest.run.peak_buffer_bytes or 0) <= need
    assert not (llama.root / "refused.partial").exists()


def sparse_checkpoint(folder: Path, config: dict[str, Any], dtype_bytes: int = 2) -> Path:
    """A checkpoint of the config's shapes whose data is a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner], "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
    }  # fmt: skip
    tensors = {"model.embed_tokens": [config["vocab_size"], hidden], "model.norm": [hidden]}
    tensors["lm_head"] = tensors["model.embed_tokens"]
    tensors |= {f"model.layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in shapes.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = dtype_bytes * torch.Size(shape).numel()
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


def test_70b_fits_20_gb_on_the_device(tmp_path: Path, llama: Any) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 1, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 8192,
    }  # fmt: skip
    aligned = sparse_checkpoint(tmp_path / "aligned70", config)
    tuned = sparse_checkpoint(tmp_path / "tuned70", config)
    with (tuned / "model.safetensors").open("r+b") as file:  # so that the first weight differs
        file.seek(8 + int.from_bytes(file.read(8), "little") + 2 * 128256 * 8192 * 2 + 8192 * 2)
        file.write(b"\1" * 64)
    job = SafeDelta(
        aligned=aligned,
        finetuned=tuned,
        output=tmp_path / "out",
        calibration=str(llama.data),
        samples=len(llama.lengths),
    )
    with pytest.raises(RequestError, match="layer of the calibrated pass"):
        plan_jobs([job], RunOptions(memory="8GiB", device="cpu"))
    runs = [JobRun(plan) for plan in plan_jobs([job], RunOptions(memory="64GiB", device="cpu"))]
    gram, weight = 4 * 28672**2, 4 * 8192 * 28672
    assert 3 * gram <= arithmetic_bytes(runs) <= 20e9
    assert host_bytes(runs, torch.device("cpu")) == arithmetic_bytes(runs)
    assert host_bytes(runs, torch.device("cuda")) <= 8 * weight  # no Grams, no factors


def test_dry_run_says_what_a_layer_takes(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(word) for word in llama.command("out", dry_run=True) if word != "--quiet"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "modules 14 of 14 expected" in out
    assert "Gram matrices, factors and compensation" in out
    assert not [path for path in llama.root.iterdir() if path.name.startswith("out")]


KILLED = """
import os, signal, sys
import torch
from safeshard.streamer import api
from safeshard.streamer.run.flow import steps
from safeshard.streamer.write import writer

torch.set_num_threads(1)
writer.COMMIT_SECONDS = 0.0
decide, done = steps.JobRun.decide, []

def dying(self, module, entry):
    decide(self, module, entry)
    done.append(module)
    if len(done) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

steps.JobRun.decide = dying
api.batch(sys.argv[1], quiet=True)
"""


def test_resume_after_sigkill(llama: Any, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    """What was finished is not computed again, and the bytes are those of one run."""
    _, _ = llama.run("whole", finetuned=llama.root / "finetuned", strength=2.0)
    options = llama.options("out", finetuned=llama.root / "finetuned", strength=2.0)
    del options["quiet"]
    job = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    file = llama.root / "jobs.yaml"
    file.write_text(json.dumps({"jobs": [{"method": "safedelta"} | job]}))
    command = [python, "-c", KILLED, str(file), "9"]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert (llama.root / "out.partial").is_dir()
    edited = []
    original = SafeDelta.edit

    def edit(self: SafeDelta, module: Any) -> Any:
        edited.append(module.name)
        return original(self, module)

    monkeypatch.setattr(SafeDelta, "edit", edit)
    batch(file, quiet=True)
    assert 1 <= len(edited) <= len(llama.grams) - 8
    assert llama.weights("out") == llama.weights("whole")


def test_fewer_samples_than_the_default_are_taken_noted_and_recomputed(llama: Any) -> None:
    """A number that is asked for stays a demand."""
    result, tensors = llama.run("few", samples=None)
    assert result.manifest is not None
    [note] = [f for f in result.manifest.fallbacks if f.asked == "calibration"]
    assert note.done == f"{len(llama.tokens)} calibration samples, all there are, in place of 128"
    _, same = llama.run("asked", samples=len(llama.tokens))
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())
    assert verify(llama.root / "few", inputs=True, recompute=1) == []
    with pytest.raises(RequestError, match="expected 128 samples"):
        llama.run("demanded", samples=128)
