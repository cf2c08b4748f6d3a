"""Bytes that flip: in an unfinished output they are done again or refused, in a finished one `verify` finds them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import NAMES, counts, flip, outputs

from safeshard.manifests.safetensors_header import read_header
from safeshard.manifests.verify import verify


@pytest.mark.parametrize("name", NAMES)
def test_flips_in_an_unfinished_output(scenario: Any, name: str) -> None:
    case = scenario(name)
    for at, dice in case.spread(case.calls, 8, "unfinished"):
        case.reset()
        case.run({"kind": "kill", "at": at})
        files = [
            path for folder in case.root.glob("*.partial") for path in folder.rglob("*") if path.stat().st_size > 0
        ]
        files = [path for path in files if path.is_file() and ".replaced" not in path.parts]
        if not files:
            continue
        path = dice.choice(files)
        position, bit = dice.randrange(path.stat().st_size), dice.randrange(8)
        flip(path, position, bit)
        about = (at, path.name, position, bit)
        again = case.run()
        if again["status"]:
            assert again["status"] == 2, (about, again["messages"])
            assert "--overwrite" in again["messages"], (about, again["messages"])
            case.check_nothing_half_done(about)
            shutil.rmtree(path.parent)  # an output that this run was to replace would be in the way of `finish`
        case.finish(about) if again["status"] else _count(case, about)


def _count(case: Any, about: Any) -> None:
    counts["cases"] += 1
    case.compare(about)
    counts["survived"] += 1


@pytest.mark.parametrize("name", NAMES)
def test_flips_in_a_finished_output(scenario: Any, name: str) -> None:
    """Every region of every file: header length, header, each tensor; the small files throughout."""
    case = scenario(name)
    case.reset()
    case.run()
    assert outputs(case.root) == case.whole
    for folder in case.root.iterdir():
        assert verify(folder) == []
        for path in sorted(folder.iterdir()):
            regions = _regions(path)
            for at, dice in case.spread(len(regions), 12, path.name):
                begin, end = regions[at]
                position, bit = dice.randrange(begin, end), dice.randrange(8)
                flip(path, position, bit)
                counts["cases"] += 1
                assert verify(folder), (path.name, position, bit)
                counts["survived"] += 1
                flip(path, position, bit)
        assert verify(folder) == []


def test_every_byte_of_a_manifest_counts(scenario: Any) -> None:
    case = scenario("adapter")
    case.reset()
    case.run()
    path = case.root / "out/manifest.json"
    for position, dice in case.spread(path.stat().st_size, 60, "manifest"):
        bit = dice.randrange(8)
        flip(path, position, bit)
        counts["cases"] += 1
        assert verify(path.parent), (position, bit)
        counts["survived"] += 1
        flip(path, position, bit)


def _regions(path: Path) -> list[tuple[int, int]]:
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [(size * i // 4, size * (i + 1) // 4) for i in range(4) if size * i // 4 < size * (i + 1) // 4]
    data = path.read_bytes()
    header = read_header(path.name, size, lambda start, stop: data[start:stop])
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = [(ref.offset, ref.offset + ref.nbytes) for ref in header.tensors.values() if ref.nbytes]
    return [(0, 8), (8, start // 2), (start // 2, start), *tensors]
