"""Peers do the same job: outputs that differ are errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safeshard.bench import peers, rows
from safeshard.manifests.errors import RunError
from safeshard.streamer.cli.app import main

MERGEKIT = shutil.which(os.environ.get("MERGEKIT", "mergekit-yaml"))


def _write(folder: Path, **tensors: torch.Tensor) -> Path:
    (folder / "out").mkdir(parents=True)
    save_file(tensors, folder / "out" / "model.safetensors")
    return folder


def test_outputs_are_compared_within_a_rounding(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 64)
    theirs = _write(tmp_path / "theirs", a=x.bfloat16(), b=x)
    half = 2.0**-9 * torch.ones(64)
    same = _write(tmp_path / "same", a=(x + half).bfloat16(), b=x)
    peers.compare(theirs, same)
    nan = x.clone()
    nan[3] = torch.nan
    for name, tensors, message in (
        ("far", {"a": (x + 0.02).bfloat16(), "b": x}, "a: the outputs differ by"),
        ("loose", {"a": x.bfloat16(), "b": x + 1e-5}, "b: the outputs differ by"),
        ("nan", {"a": x.bfloat16(), "b": nan}, "b: the outputs differ by nan"),
        ("other", {"a": x.bfloat16()}, "the outputs hold other tensors"),
        ("dtype", {"a": x.clone(), "b": x}, "a: BF16 .* by the peer, F32"),
        ("shape", {"a": x.bfloat16()[:32], "b": x}, r"a: BF16 \[64\]"),
    ):
        with pytest.raises(RunError, match=message):
            peers.compare(theirs, _write(tmp_path / name, **tensors))


def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str, executable: str | None = None) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    peers.run(tmp_path, "llama-tiny", 1, 1, True, [peer], executable)
    theirs, ours = rows.read("peers")
    assert theirs["backend"].lower().startswith(peer)
    assert ours["against"] == theirs["backend"]
    ratio = float(theirs["median_s"]) / float(ours["median_s"])
    assert float(ours["time_ratio"]) == pytest.approx(ratio, rel=0.01)
    memory = int(ours["peak_rss_bytes"]) / int(theirs["peak_rss_bytes"])
    assert float(ours["memory_ratio"]) == pytest.approx(memory, abs=0.001)
    assert not list(tmp_path.glob("bench-*"))


def test_peft_merges_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    _rows(tmp_path, monkeypatch, "peft")


@pytest.mark.skipif(MERGEKIT is None, reason="needs mergekit-yaml on the PATH, or named by MERGEKIT")
def test_mergekit_merges_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _rows(tmp_path, monkeypatch, "mergekit", MERGEKIT)


def test_a_missing_mergekit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "peers", "--shape", "llama-tiny", "--folder", str(tmp_path), "--mergekit", "no-such-program"])
    assert stop.value.code == 2
    assert "--mergekit: expected the executable mergekit-yaml, got no-such-program" in capsys.readouterr().err
