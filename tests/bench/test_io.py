"""Every method of reading reads every byte, and what is measured is what a job reads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safeshard.bench import durability, rows
from safeshard.bench.inputs.models import prepare
from safeshard.bench.machine import io, measure
from safeshard.bench.pages.documents import markdown
from safeshard.manifests.errors import RunError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("models")
    return folder, prepare(folder, "llama-tiny", 1, finetuned=True)[1]


def short(read: Callable[..., int]) -> Callable[..., int]:
    return lambda fd, buffers, at: read(fd, [buffers[0][:1000]], at)


def test_short_reads_are_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(10_123))
    monkeypatch.setattr(io, "PIECE", 4096)
    monkeypatch.setattr(io, "THREADS", 1)
    monkeypatch.setattr(os, "preadv", short(os.preadv))
    pieces: list[bytearray] = []

    def buffer(size: int) -> memoryview:
        pieces.append(bytearray(size))
        return memoryview(pieces[-1])

    io._preadv([file], buffer)
    assert b"".join(pieces)[:10_123] == file.read_bytes()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_bytes(bytes(100))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match="ends at byte 0, not 100"):
        io._preadv([tmp_path / "data"], io._fresh)


def test_rows_count_the_bytes_of_both_files(
    models: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, paths = models
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    io.run(folder, "llama-tiny", 1, runs=1, cold=True)
    made = {row["what"]: row for row in rows.read("io")}
    size = [(paths[name] / "model.safetensors").stat().st_size for name in ("aligned", "unaligned")]
    assert {"preadv into a reused buffer", "safetensors, mmap", "write and sync"} <= made.keys()
    for what in made.keys() & {*io.METHODS, io.DISK}:
        assert int(made[what]["bytes"]) == sum(size), what
    assert int(made["write and sync"]["bytes"]) == size[0]
    assert [pair.split("=")[0] for pair in made["write and sync"]["stages"].split()] == ["sync", "write"]
    assert {row["cache"] for row in made.values()} == {"cold"}
    read = measure.tensor_bytes([paths["aligned"], paths["unaligned"]], "_proj")
    for way in ("direct", "buffered"):
        row = made[f"as a job reads, --io {way}"]
        assert int(row["bytes"]) == pytest.approx(read, abs=64 * 100)  # each tensor begins at 64
        rates = int(row["bytes"]) / float(row["median_s"]), sum(size) / float(made[io.DISK]["median_s"])
        assert float(row["share_of_ceiling"]) == pytest.approx(rates[0] / rates[1], abs=2e-3, rel=2e-3)
        assert re.fullmatch(r"processor=[0-9.]+", row["stages"])
    assert "| processor a GB |" in markdown([made[io.DISK]])


def test_a_pattern_chooses_what_is_read(models: tuple[Path, dict[str, Path]]) -> None:
    _, paths = models
    folders = [paths["aligned"], paths["adapter-0"]]
    tensors = {
        name: tensor for folder in folders for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }  # fmt: skip
    for pattern in ("", "_proj", "q_proj.weight$"):
        expected = sum(t.numel() * t.element_size() for name, t in tensors.items() if re.search(pattern, name))
        assert measure.tensor_bytes(folders, pattern) == expected > 0
    sample = measure.plain_read(folders, "_proj")
    assert sample.nbytes == measure.tensor_bytes(folders, "_proj")
    assert sample.seconds > 0


def test_the_memory_of_this_process_is_not_counted() -> None:
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    assert 0 < measure.process([sys.executable, "-S", "-c", "pass"]).peak < 100 << 20


def test_a_failure_says_what_failed() -> None:
    with pytest.raises(RunError, match=r"(?s)status 3.*broken"):
        measure.process([sys.executable, "-S", "-c", "import sys; sys.stderr.write('broken'); sys.exit(3)"])


def test_durability_is_set_against_the_job(
    models: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, paths = models
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    durability.run(folder, "llama-tiny", 1, runs=1, cold=True)
    job, *parts = rows.read("durability")
    tensors = [measure.tensor_bytes([paths[name]]) for name in ("aligned", "finetuned", "aligned")]
    assert int(job["bytes"]) == pytest.approx(sum(tensors), rel=0.05)  # and headers
    assert [part["what"].split()[0] for part in parts] == ["hash", "sync"]
    for part in parts:
        assert part["against"] == job["what"]
        ratio: Any = float(job["median_s"]) / float(part["median_s"])
        assert float(part["time_ratio"]) == pytest.approx(ratio, rel=0.01)
        assert int(part["bytes"]) == (paths["aligned"] / "model.safetensors").stat().st_size
