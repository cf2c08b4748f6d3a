"""Which way local files are read, and that no byte of an output depends on it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.manifests.errors import RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer import safelora, safemerge, scale
from safeshard.streamer.inputs.read import GRAIN, Read, Step, aligned
from safeshard.streamer.run.flow import reading, strips
from safeshard.streamer.sources import LocalSource, direct, local, open_source
from safeshard.streamer.sources.direct import BLOCK
from safeshard.streamer.write import part_files

MEBI = 1 << 20


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tensors, strips and spans were read past the page cache, and by which way, however small they are."""
    for module in (direct, local):
        monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(strips, "NEAR_BYTES", 3000)
    monkeypatch.setattr(part_files, "CHUNK_BYTES", 1024)
    seen = Counter[str]()
    for name in ("read_around", "read_aside"):
        monkeypatch.setattr(local, name, counting(getattr(local, name), name, seen))
    return seen


def counting(function: Any, name: str, seen: Counter[str]) -> Any:
    def counted(*args: Any) -> Any:
        seen[name] += 1
        return function(*args)

    return counted


def shift_data(folder: Path, more: int) -> None:
    """Let the data of a folder's shards begin `more` bytes later: a header may end with spaces."""
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        path.write_bytes((size + more).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * more + raw[8 + size :])


def outputs(manifest: Any) -> Any:
    return [m.model_dump() for m in manifest.modules], [t.model_dump() for t in manifest.tensors]


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_the_same_whichever_way(world: Any, ways: Counter[str], shift: int, dtype: torch.dtype) -> None:
    world.sizes = {"hidden": 48, "kv": 16, "inner": 72}
    aligned = world.llama(1, seed=1, dtype=dtype)
    moved = {n: (t.float() + 0.01 * torch.randn_like(t.float())).to(dtype) for n, t in aligned.items()}
    tuned = {n: (t.float() + 0.01 * torch.randn_like(t.float())).to(dtype) for n, t in aligned.items()}
    base = {"aligned": world.checkpoint("aligned", aligned), "unaligned": world.checkpoint("unaligned", moved)}
    full, safe = (
        world.checkpoint("finetuned", tuned),
        world.checkpoint("safe", aligned | {"lm_head.weight": moved["lm_head.weight"]}),
    )
    adapter = world.adapter("adapter", aligned, seed=2)
    for folder in (*base.values(), full, safe, adapter):
        shift_data(folder, shift)
    made = {}
    for io in ("buffered", "direct"):
        ways.clear()
        out, common = world.root / io, {"io": io, "quiet": True}
        made[io] = [
            safelora(**base, adapter=adapter, threshold=2.0, output=out / "lora", **common),
            safemerge(**base, finetuned=full, safe=safe, threshold=0.5, output=out / "full", **common),
            scale(aligned=base["aligned"], finetuned=full, factor=0.5, output=out / "scaled", **common),
            scale(aligned=base["aligned"], adapter=adapter, factor=0.5, output=out / "whole", **common),
        ]
        assert bool(ways) == (io == "direct")
    assert bool(ways["read_around"]) == (shift % dtype.itemsize == 0)  # else values lie across words
    assert ways["read_aside"]
    for one, other in zip(made["buffered"], made["direct"], strict=True):
        assert outputs(one.manifest) == outputs(other.manifest)
        assert one.manifest.run.bytes_read == other.manifest.run.bytes_read


def test_tensors_taken_over_pass_the_cache_by(world: Any, ways: Counter[str], load_tensors: Any) -> None:
    """Of a merged checkpoint the norms and embeddings are copies, whatever of a block they begin at."""
    aligned = world.llama(1, seed=1) | {"model.embed_tokens.weight": torch.randn(501, 24).bfloat16()}
    places = {"aligned": world.checkpoint("aligned", aligned), "adapter": world.adapter("adapter", aligned)}
    manifest = scale(
        **places, output=world.root / "out", output_format="checkpoint", factor=0.5, io="direct", quiet=True
    ).manifest
    assert manifest.run.seconds["copy"] > 0
    out = load_tensors(world.root / "out")
    copied = {t.name for t in manifest.tensors if t.action == "copied"}
    assert "model.embed_tokens.weight" in copied
    assert all(torch.equal(out[name], aligned[name]) for name in copied)


def test_a_tensor_taken_over_that_is_not_finite(world: Any, ways: Counter[str]) -> None:
    aligned = world.llama(1, seed=1)
    aligned["model.embed_tokens.weight"][31, 23] = torch.inf
    places = {"aligned": world.checkpoint("aligned", aligned), "adapter": world.adapter("adapter", aligned)}
    with pytest.raises(RunError, match=r"model\.embed_tokens\.weight holds NaN or infinity"):
        scale(**places, output=world.root / "out", output_format="checkpoint", factor=0.5, io="direct", quiet=True)


def test_a_file_system_that_refuses_is_read_through_the_cache(
    world: Any, ways: Counter[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trio = world.trio(layers=1)
    expected = safemerge(**trio, output=world.root / "one", quiet=True).manifest
    monkeypatch.setattr(local, "open_direct", lambda path: None)
    manifest = safemerge(**trio, output=world.root / "two", quiet=True, io="direct").manifest
    assert outputs(manifest) == outputs(expected)
    assert not ways
    assert f"{trio['aligned']}: its file system has no reads past the page cache" in caplog.text


def test_a_file_that_shrinks_underway(world: Any, ways: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trio = world.trio(layers=1)
    file = trio["aligned"] / "model.safetensors"
    choose = reading.choose_reading

    def then_shrink(*args: Any) -> None:
        choose(*args)
        os.truncate(file, file.stat().st_size - 100)

    monkeypatch.setattr("safeshard.streamer.run.one_pass.choose_reading", then_shrink)
    with pytest.raises(RunError, match=r"model.safetensors has nothing at byte .* truncated"):
        safemerge(**trio, output=world.root / "out", quiet=True, io="direct")
    assert not (world.root / "out").exists()


# What "auto" chooses.


@pytest.fixture
def sources(tmp_path: Path) -> list[LocalSource]:
    (tmp_path / "model.safetensors").write_bytes(bytes(9 * MEBI))
    sources = [open_source(tmp_path), open_source(tmp_path)]
    return [source for source in sources if isinstance(source, LocalSource)]


@pytest.mark.parametrize(("past_the_cache", "expected"), [(0.9, True), (1.0, True), (1.1, False)])
def test_the_faster_way_is_measured(
    sources: list[LocalSource], monkeypatch: pytest.MonkeyPatch, past_the_cache: float, expected: bool
) -> None:
    """A read takes a second through the cache; each way meets other places, all over the file."""
    clock, seen = [0.0], []
    readinto = LocalSource.readinto_room

    def timed(self: LocalSource, name: str, offset: int, nbytes: int, room: memoryview) -> int:
        clock[0] += past_the_cache if self.direct else 1.0
        seen.append((self.direct, offset))
        return readinto(self, name, offset, nbytes, room)

    monkeypatch.setattr(LocalSource, "readinto_room", timed)
    assert reading.is_faster(sources, lambda: clock[0]) == expected
    assert [direct for direct, _ in seen] == [False, True] * (reading.PLACES // 2)
    assert [offset for _, offset in seen] == sorted({offset for _, offset in seen})


@pytest.mark.parametrize("faster", [True, False])
def test_auto_measures_where_files_are_larger_than_memory(
    sources: list[LocalSource], monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(reading, "is_faster", lambda given: asked.append(len(given)) or faster)
    monkeypatch.setattr(reading, "memory_bytes", lambda: 9 * MEBI)  # one place, opened twice, fits
    reading.choose_reading("auto", sources)
    assert not asked
    assert not any(source.direct for source in sources)
    monkeypatch.setattr(reading, "memory_bytes", lambda: 9 * MEBI - 1)
    reading.choose_reading("auto", sources)
    assert asked == [2]
    assert [source.direct for source in sources] == [faster] * 2
    reading.choose_reading("buffered", sources)
    assert asked == [2]
    assert not any(source.direct for source in sources)


@pytest.mark.parametrize("machine", ["smaller", "large enough"])
def test_auto_passes_the_cache_by_where_memory_is_smaller_than_the_inputs(
    world: Any, ways: Counter[str], monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    """A whole job with nothing said about reading, on a machine with a byte too little for its inputs, or enough."""
    trio = world.trio(layers=1)
    expected = safemerge(**trio, output=world.root / "cached", quiet=True, io="buffered").manifest
    assert not ways
    # All that lies there, each place once: of adapters, too.
    size = sum(file.stat().st_size for folder in trio.values() for file in Path(folder).glob("*.safetensors"))
    monkeypatch.setattr(reading, "memory_bytes", lambda: size - (machine == "smaller"))
    monkeypatch.setattr(reading, "is_faster", lambda sources: True)  # a clock's word: measured in a test above
    manifest = safemerge(**trio, output=world.root / "auto", quiet=True).manifest
    assert bool(ways) == (machine == "smaller")
    assert outputs(manifest) == outputs(expected)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (world.root / "auto" / name).read_bytes() == (world.root / "cached" / name).read_bytes()


def test_a_steps_buffer_holds_the_blocks_around_its_tensors(
    sources: list[LocalSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget counts what is read, whichever way; what is large begins at a block."""
    refs = [
        TensorRef(str(n), "BF16", (nbytes // 2,), "model.safetensors", offset, nbytes)
        for n, (offset, nbytes) in enumerate(((BLOCK - 2, 3 * MEBI), (10, 200), (3 * MEBI + 4098, 2 * MEBI)))
    ]
    step = Step("x", {ref.name: Read(sources[0], ref) for ref in refs})
    assert step.nbytes == sum(aligned(ref.nbytes) for ref in refs)
    assert step.cost == aligned(5 * MEBI + 2 * BLOCK + 256, GRAIN)
    rooms = {read.ref.name: offset for read, offset in step.rooms()}
    assert rooms == {"0": 0, "2": 3 * MEBI + BLOCK, "1": 5 * MEBI + 2 * BLOCK}
