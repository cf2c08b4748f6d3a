"""Hostile files: each is refused with a message, within bounded time, and nothing leaves the folders named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safeshard.manifests import RequestError
from safeshard.manifests.errors import RunError
from safeshard.manifests.safetensors_header import HeaderError, layout, read_header
from safeshard.streamer import safedelta, safelora, scale
from safeshard.streamer.calibration import factor_files
from safeshard.streamer.inputs.lora_config import read_config
from safeshard.streamer.plan.doubts import checks
from safeshard.streamer.plan.request.jobs_file import read_jobs
from safeshard.streamer.run.scores import score_table
from safeshard.streamer.sources import open_source, read_json


def header(entry: object, name: str = "a") -> bytes:
    text = json.dumps({name: entry}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "raw",
    [
        header({"dtype": "F32", "shape": [2**62] * 64, "data_offsets": [0, 8]}),  # too large for a float
        header({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a." * 100_000),
    ],
)
def test_header_beyond_all_bounds(raw: bytes) -> None:
    with pytest.raises(HeaderError):
        read_header("x", len(raw) + 8, lambda start, stop: raw[start:stop])


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ('{"r": 1, "r": 2}', "twice"),
        ('{"a": ' + "[" * 400 + "]" * 400 + "}", "deeper"),
        ("[" * 100_000, "RecursionError"),
        ('{"a": "\\ud800"}', "surrogates"),
        ("1" * 5000, "ValueError"),
    ],
)
def test_json_that_could_not_be_written_again(tmp_path: Path, text: str, got: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError, match=got):
        read_json(open_source(tmp_path), "config.json")


@pytest.mark.parametrize("value", ["null", "3", '{"a": [1, {"b": NaN}]}'])
def test_plain_json_is_read(tmp_path: Path, value: str) -> None:
    (tmp_path / "x.json").write_text(value)
    assert repr(read_json(open_source(tmp_path), "x.json")) == repr(json.loads(value))


@pytest.mark.parametrize("text", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!python/name:os.system"])
def test_yaml_tags_that_break_their_constructors(tmp_path: Path, text: str) -> None:
    (tmp_path / "jobs.yaml").write_text(f"jobs: {text}\n")
    with pytest.raises(RequestError, match="valid YAML"):
        read_jobs(tmp_path / "jobs.yaml")


@pytest.mark.parametrize("adapter", ["..", "x/..", ".", "/"])
def test_an_output_template_stays_in_its_folder(tmp_path: Path, adapter: str) -> None:
    jobs = {"jobs": [{"method": "scale", "aligned": "a", "factor": 1, "adapter": adapter, "output": "out/{adapter}/x"}]}
    (tmp_path / "jobs.yaml").write_text(json.dumps(jobs))
    with pytest.raises(RequestError, match="a value with a name"):
        read_jobs(tmp_path / "jobs.yaml")


def test_a_million_targets_are_matched_by_lookup() -> None:
    names = [f"model.layers.{n}.q" for n in range(1_000_000)]
    config: Any = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names}
    read = read_config("x", config)
    assert all(read.targets(f"base.model.layers.{n}.q") for n in range(2000))
    assert not any(read.targets(f"base.model.layers.{n}.qq") or read.targets(f"xmodel.layers.{n}.q") for n in range(9))


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx"])
def test_a_score_table_holds_no_formulas(name: str) -> None:
    finetuned = SimpleNamespace(source=SimpleNamespace(spec=name))
    result: Any = SimpleNamespace(plan=SimpleNamespace(finetuned=finetuned), cosines={name: -0.5})
    row = score_table([result], ".csv").splitlines()[1]
    assert row.startswith(("'", "\"'"))
    assert row.endswith(",-0.5")


@pytest.mark.parametrize("output", ["o\0x", "o\ud800"])
def test_an_output_that_no_path_can_hold(output: str) -> None:
    with pytest.raises(RequestError, match="text without NUL and lone surrogates"):
        scale(aligned="a", adapter="b", factor=0.5, output=output)


@pytest.mark.parametrize("name", ["x" * 250, "x/" * 3000, "new/" + "x" * 250, "x" * 300 + "/out"])
def test_an_output_with_too_long_a_name(world: Any, name: str) -> None:
    given = world.trio()
    with pytest.raises(RequestError, match="a folder to write, got File name too long"):
        scale(aligned=given["aligned"], adapter=given["adapter"], factor=0.5, output=world.root / name, quiet=True)


def test_a_giant_tokenizer_is_refused(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_SIDE_BYTES", 10)
    given = world.trio()
    (given["adapter"] / "tokenizer.json").write_text("x" * 11)
    (given["aligned"] / "vocab.json").write_text("x" * 10)
    with pytest.raises(RequestError) as caught:
        scale(aligned=given["aligned"], adapter=given["adapter"], factor=0.5, output=world.root / "out", quiet=True)
    (offence,) = caught.value.offences
    assert (offence.where, offence.expected) == (f"{given['adapter']}/tokenizer.json", "at most 10 bytes")


def test_a_giant_index_of_factors_is_refused(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_files, "MAX_JSON_BYTES", 10)
    given = world.trio()
    folder = world.root / "factors"
    folder.mkdir()
    (folder / "factors.json").write_text("[" * 11)
    with pytest.raises(RequestError, match=r"factors\.json: expected at most 10 bytes, got 11 bytes"):
        safedelta(aligned=given["aligned"], adapter=given["adapter"], factors=folder, output=world.root / "out")


def make_full(world: Any, changed: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Arguments of a SafeLoRA job on a full checkpoint; `changed` replaces tensors of all three models."""
    folders = {
        role: world.checkpoint(role, world.llama(1, seed=seed, dtype=dtype) | changed)
        for seed, role in enumerate(("aligned", "unaligned", "finetuned"))
    }
    return folders | {"output": world.root / "out", "threshold": 0.35, "quiet": True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_only_copied_must_be_finite(world: Any, dtype: torch.dtype, value: float) -> None:
    norm = torch.ones(24, dtype=dtype)
    norm[-1] = value
    with pytest.raises(RunError, match=r"finetuned/model\.safetensors: model\.norm\.weight holds NaN or infinity"):
        safelora(**make_full(world, {"model.norm.weight": norm}, dtype))
    assert not (world.root / "out").exists()


def test_a_late_infinity_in_a_large_copied_tensor(world: Any) -> None:
    embedding = torch.zeros(70_001, 24, dtype=torch.bfloat16)  # three chunks and a bit
    embedding[-1, -1] = -torch.inf
    with pytest.raises(RunError, match="embed_tokens"):
        safelora(**make_full(world, {"model.embed_tokens.weight": embedding}))


def test_integers_with_the_bits_of_infinity_are_copied(world: Any) -> None:
    counts = torch.full((3, 5), 0x7F80, dtype=torch.int16)
    safelora(**make_full(world, {"model.counts": counts}))
    assert torch.equal(load_file(world.root / "out/model.safetensors")["model.counts"], counts)


@pytest.mark.parametrize("name", ["model.extra", "model.layers.0.mlp.extra_proj.weight", "model.layers.0.mlp.x.weight"])
@pytest.mark.parametrize("shape", [(0, 24), (24, 0), (0,)])
def test_tensors_without_elements(world: Any, name: str, shape: tuple[int, ...]) -> None:
    given = make_full(world, {name: torch.empty(shape, dtype=torch.bfloat16)})
    safelora(**given)
    assert load_file(world.root / "out/model.safetensors")[name].shape == shape
    scale(aligned=given["aligned"], finetuned=given["finetuned"], factor=0.5, output=world.root / "scaled", quiet=True)
    assert load_file(world.root / "scaled/model.safetensors")[name].shape == shape


def test_an_adapter_on_a_weight_without_elements_is_refused(world: Any) -> None:
    key = "model.layers.0.self_attn.q_proj"
    tensors = world.llama(1)
    pairs = world.pairs(tensors, 4, 0) | {f"base_model.model.{key}.lora_A.weight": torch.zeros(4, 0)}
    aligned = world.checkpoint("aligned", tensors | {f"{key}.weight": torch.empty(24, 0, dtype=torch.bfloat16)})
    adapter = world.adapter("adapter", tensors, tensors=pairs)
    with pytest.raises(RequestError, match=r"q_proj\.weight: expected a 2-D weight with elements, got \[24, 0\]"):
        scale(aligned=aligned, adapter=adapter, factor=0.5, output=world.root / "out", quiet=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_denormals_are_kept(world: Any, dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal / 64
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    tensors = world.llama(1, dtype=dtype)
    aligned = world.checkpoint("aligned", tensors | {q_proj: torch.zeros(24, 24, dtype=dtype)})
    tuned = world.checkpoint("finetuned", tensors | {q_proj: torch.full((24, 24), 2 * least, dtype=dtype)})
    scale(aligned=aligned, finetuned=tuned, factor=0.5, output=world.root / "out", quiet=True)
    new = load_file(world.root / "out/model.safetensors")[q_proj]
    assert torch.equal(new, torch.full((24, 24), least, dtype=dtype))
    assert (new > 0).all()


def sparse_checkpoint(folder: Path, seed: int) -> Path:
    """A checkpoint of one linear and an embedding of more than 2^31 elements, of which the disk holds nothing."""
    folder.mkdir()
    tensors = [("model.embed_tokens.weight", "BF16", (2**31 + 8, 1)), ("model.layers.0.q_proj.weight", "F32", (4, 4))]
    header, refs = layout("model.safetensors", tensors, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(ref.nbytes for ref in refs.values()))
        file.seek(refs["model.layers.0.q_proj.weight"].offset)
        file.write(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).numpy().tobytes())
    return folder


@pytest.mark.parametrize(
    "command", [["safelora", "--unaligned", "unaligned", "--threshold", "0.3"], ["scale", "--factor", "0.5"]]
)
def test_planning_takes_no_memory_for_a_tensor_of_2_to_the_31(tmp_path: Path, command: list[str]) -> None:
    for seed, role in enumerate(("aligned", "unaligned", "finetuned")):
        sparse_checkpoint(tmp_path / role, seed)
    inputs = ["--aligned", "aligned", "--finetuned", "finetuned", "--output", "out", "--dry-run"]
    program = [sys.executable, "-c", "from safeshard.streamer.cli.app import entry; entry()", *command, *inputs]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(program, cwd=tmp_path, stdout=log, stderr=log)
        _, wait_status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(wait_status)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 0, text
    assert "dry run: nothing was written" in text
    assert usage.ru_maxrss * 1024 < 2**31  # of 4.3 GB a copy
