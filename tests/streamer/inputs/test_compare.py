"""same_tensors: equal, different in one byte anywhere, different in kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.streamer.inputs import compare
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.inputs.compare import Place, same_tensors
from safeshard.streamer.sources import LocalSource, open_source


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(50, 70, generator=generator) for name in ("a", "b")} | {"empty": torch.empty(0, 3)}


def places(folder: Path, tensors: dict[str, Tensor]) -> list[Place]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(open_source(folder))
    return [(checkpoint.source, ref) for _, ref in sorted(checkpoint.tensors.items())]


def pairs(tmp_path: Path, other: dict[str, Tensor]) -> list[tuple[Place, Place]]:
    return list(zip(places(tmp_path / "one", tensors()), places(tmp_path / "other", other), strict=True))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SAMPLE_BYTES", 64)
    monkeypatch.setattr(compare, "CHUNK_BYTES", 1000)


def test_equal(tmp_path: Path) -> None:
    assert same_tensors(pairs(tmp_path, tensors()))


@pytest.mark.parametrize("at", [0, 999, 1000, 7000, 50 * 70 * 4 - 1])
def test_one_byte_differs(tmp_path: Path, at: int) -> None:
    other = tensors()
    other["b"].view(-1).view(torch.uint8)[at] ^= 1
    assert not same_tensors(pairs(tmp_path, other))


@pytest.mark.parametrize("kind", ["dtype", "shape"])
def test_another_kind(tmp_path: Path, kind: str) -> None:
    other = tensors()
    other["a"] = other["a"].view(torch.int32) if kind == "dtype" else other["a"].view(70, 50)
    assert not same_tensors(pairs(tmp_path, other))


def test_nothing_to_compare() -> None:
    assert not same_tensors([])


def test_a_sample_tells_most_checkpoints_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {name: tensor + 1 for name, tensor in tensors().items()}
    both, counts = pairs(tmp_path, other), []
    readinto = LocalSource.readinto

    def count(self: LocalSource, name: str, offset: int, view: memoryview) -> None:
        counts.append(len(view))
        readinto(self, name, offset, view)

    monkeypatch.setattr(LocalSource, "readinto", count)
    assert not same_tensors(both)
    assert counts == [64, 64]


def test_truncated_underway(tmp_path: Path) -> None:
    both = pairs(tmp_path, tensors())
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(RunError, match=r"other/model\.safetensors has nothing at byte"):
        same_tensors(both)
