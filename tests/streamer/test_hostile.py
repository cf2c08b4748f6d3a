"""Hostile files: each is refused with a message, within bounded time, and nothing leaves the folders named."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safeshard.manifests import RequestError
from safeshard.manifests.safetensors_header import HeaderError, read_header
from safeshard.streamer.api import score_table
from safeshard.streamer.jobs_file import read_jobs
from safeshard.streamer.lora_config import read_config
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
    result: Any = SimpleNamespace(job=SimpleNamespace(adapter=name, finetuned=None), cosines={name: -0.5})
    row = score_table([result], ".csv").splitlines()[1]
    assert row.startswith(("'", "\"'"))
    assert row.endswith(",-0.5")
