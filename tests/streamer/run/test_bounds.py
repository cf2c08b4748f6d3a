"""Memory: what is in flight never exceeds --memory, whatever the number of layers or of jobs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer import batch, safelora, safemerge, scale
from safeshard.streamer.clock import Clock
from safeshard.streamer.inputs.read import GRAIN, Read, Step
from safeshard.streamer.run.flow import strips
from safeshard.streamer.run.flow.stream import Buffers, run_steps
from safeshard.streamer.sources import LocalSource

MEBI = 1 << 20


class Zeros:
    """A source whose every byte is zero."""

    spec = identity = "zeros"
    revision = None

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        view[:] = bytes(len(view))


def make_step(name: str, nbytes: int, scratch: int) -> Step:
    read = Read(Zeros(), TensorRef(name, "U8", (nbytes,), "f", 0, nbytes))  # type: ignore[arg-type]
    return Step(name, {read.key: read}, scratch=scratch)


class Watched(Buffers):
    """Records the bytes held, buffers kept for reuse included, after every change."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.held: list[int] = []

    def take(self, step: Step) -> torch.Tensor:
        buffer = super().take(step)
        self.held.append(self.used + sum(b.numel() for b in self._free))
        return buffer


sizes = st.tuples(st.integers(0, 8 * MEBI), st.integers(0, 8 * MEBI))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(sizes, max_size=12), order=st.randoms(use_true_random=False))
def test_buffers_stay_under_the_limit(steps: list[tuple[int, int]], order: random.Random) -> None:
    buffers = Watched(17 * MEBI)
    held: list[tuple[Step, torch.Tensor]] = []
    for number, (nbytes, scratch) in enumerate(steps):
        step = make_step(str(number), nbytes, scratch)
        while held and buffers.used + step.cost > buffers.limit:
            buffers.give(*held.pop(order.randrange(len(held))))
        buffer = buffers.take(step)
        assert buffer.numel() >= step.nbytes
        held.append((step, buffer))
    for taken in held:
        buffers.give(*taken)
    assert max(buffers.held, default=0) == buffers.peak <= buffers.limit
    assert buffers.used == 0


def test_a_step_that_can_never_fit_is_an_error() -> None:
    buffers = Buffers(4 * GRAIN)
    with pytest.raises(RunError, match=r"layer\.0 needs"):
        buffers.take(make_step("layer.0", GRAIN, 4 * GRAIN))
    assert buffers.used == 0


def test_counters_return_to_zero_after_a_failure() -> None:
    buffers = Buffers(8 * GRAIN)

    def compute(step: Step, loaded: Mapping[Any, torch.Tensor]) -> None:
        if step.name == "3":
            raise RunError("three")

    steps = [make_step(str(n), GRAIN, GRAIN) for n in range(40)]
    with pytest.raises(RunError, match="three"):
        run_steps(steps, compute, buffers=buffers, clock=Clock(), workers=2)
    assert buffers.used == 0
    assert not [t for t in threading.enumerate() if t.name.startswith(("worker", "reader"))]


def test_readers_run_no_further_ahead_than_the_budget() -> None:
    buffers, gate = Watched(6 * GRAIN), threading.Event()
    started: list[str] = []

    def steps() -> Iterator[Step]:
        for number in range(30):
            started.append(str(number))
            if number == 3:  # the third buffer cannot be had before a step ends
                gate.set()
            yield make_step(str(number), GRAIN, GRAIN)

    def compute(step: Step, loaded: Mapping[Any, torch.Tensor]) -> None:
        assert gate.wait(10)

    run_steps(steps(), compute, buffers=buffers, clock=Clock(), workers=4)
    assert len(started) == 30
    assert buffers.peak == 6 * GRAIN


def options(world: Any, layers: int, shards: int = 1) -> dict[str, Any]:
    root = type(world)(world.root / f"{layers}-{shards}")
    root.sizes = {"hidden": 96, "kv": 48, "inner": 160}
    return root.trio(layers=layers, shards=shards) | {"output": root.root / "out", "quiet": True}


def test_layers_do_not_raise_the_peak(world: Any) -> None:
    memory = 19 * MEBI  # one step at once, so that no thread's timing shows
    peaks = []
    for layers in (3, 12):
        manifest = safemerge(**options(world, layers), memory=memory).manifest
        assert manifest is not None
        peaks.append(manifest.run.peak_buffer_bytes)
    assert 0 < peaks[0] <= memory
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("memory", [19 * MEBI, 40 * MEBI, 400 * MEBI])
def test_manifest_names_a_peak_within_the_budget(world: Any, memory: int) -> None:
    manifest = safemerge(**options(world, 4, 3), memory=memory).manifest
    assert manifest is not None
    assert 0 < manifest.run.peak_buffer_bytes <= memory


def test_a_module_that_does_not_fit_is_refused_up_front(world: Any) -> None:
    with pytest.raises(RequestError) as refused:
        safemerge(**options(world, 2), memory=MEBI)
    [offence] = refused.value.offences  # the costliest module says what would do for all
    assert (offence.where, offence.what) == ("--memory", "model.layers.1.mlp.up_proj")
    assert not list((world.root / "2-1").glob("out*"))


@pytest.fixture
def embedding_of_40_mib(world: Any) -> dict[str, Any]:
    """Full checkpoints whose embedding is larger than two strips, and a budget that two of them exceed."""
    aligned = world.llama(1, seed=1) | {"model.embed_tokens.weight": torch.randn(1 << 20, 20).bfloat16()}
    moved = {n: (t.float() + 0.01).bfloat16() for n, t in aligned.items()}
    places = {r: world.checkpoint(r, moved if i else aligned) for i, r in enumerate(("aligned", "finetuned"))}
    return places | {"quiet": True, "memory": 72 * MEBI}


def test_an_embedding_larger_than_the_budget_is_scaled(
    world: Any, embedding_of_40_mib: dict[str, Any], load_tensors: Any
) -> None:
    manifest = scale(**embedding_of_40_mib, output=world.root / "out", factor=0.25).manifest
    assert manifest is not None
    assert manifest.run.peak_buffer_bytes <= 72 * MEBI
    base, tuned, out = (load_tensors(world.root / name) for name in ("aligned", "finetuned", "out"))
    for name, tensor in base.items():
        expected = tensor.double() + 0.25 * (tuned[name].double() - tensor.double())
        torch.testing.assert_close(out[name].double(), expected, rtol=2**-8, atol=0)
    assert manifest.run.bytes_read == sum(2 * t.nbytes for t in base.values())


@pytest.mark.parametrize("memory", ["72MiB", "2GiB"])
def test_strips_ask_for_each_byte_before_they_read_it(
    world: Any, embedding_of_40_mib: dict[str, Any], monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    asked: dict[tuple[Path, str], list[tuple[int, int]]] = {}
    late: list[tuple[str, int]] = []
    readinto = LocalSource.readinto

    def prefetch(self: LocalSource, name: str, offset: int, nbytes: int) -> None:
        asked.setdefault((self.folder, name), []).append((offset, offset + nbytes))

    def read(self: LocalSource, name: str, offset: int, view: memoryview) -> None:
        if len(view) > 64:  # no length of a header, nor a norm
            ranges = asked.get((self.folder, name), [])
            if not any(start <= offset and offset + len(view) <= stop for start, stop in ranges):
                late.append((name, offset))
        readinto(self, name, offset, view)

    monkeypatch.setattr(LocalSource, "prefetch", prefetch)
    monkeypatch.setattr(strips, "AHEAD_BYTES", 1 << 20)
    monkeypatch.setattr(strips, "NEAR_BYTES", 1 << 18)
    result = scale(**embedding_of_40_mib | {"memory": memory}, output=world.root / "out", factor=0.25)
    assert result.manifest is not None
    sizes = {file.name: file.stat().st_size for file in (world.root / "aligned").glob("*.safetensors")}
    [name] = sizes
    data_starts = min(offset for (_, file), ranges in asked.items() for offset, _ in ranges if file == name)
    assert [place for place in late if place[1] >= data_starts] == []
    assert max(stop for ranges in asked.values() for _, stop in ranges) == sizes[name]


def test_jobs_share_the_strips_of_a_large_tensor(world: Any, embedding_of_40_mib: dict[str, Any]) -> None:
    jobs = world.root / "jobs.yaml"
    places = {role: str(embedding_of_40_mib[role]) for role in ("aligned", "finetuned")}
    entries = [{"method": "scale", "factor": f, "output": str(world.root / f"out-{f}")} for f in (0.25, 0.5)]
    jobs.write_text(json.dumps({"defaults": places, "jobs": entries}))
    first, second = (r.manifest for r in batch(jobs, quiet=True, memory=72 * MEBI))
    alone = scale(**embedding_of_40_mib, output=world.root / "alone", factor=0.25).manifest
    assert first is not None
    assert second is not None
    assert alone is not None
    assert first.run.bytes_read == alone.run.bytes_read
    assert [t.blake3 for t in first.tensors] == [t.blake3 for t in alone.tensors] != [t.blake3 for t in second.tensors]


def test_models_of_other_sizes_are_scaled_in_one_batch(world: Any, load_tensors: Any) -> None:
    """Their tensors have the same names."""
    models, entries = {}, []
    for hidden in (24, 56, 40):
        world.sizes["hidden"] = hidden
        aligned = world.llama(1, seed=hidden)
        models[hidden] = aligned, {n: (t.float() + 0.01).bfloat16() for n, t in aligned.items()}
        places = zip(("aligned", "finetuned"), models[hidden], strict=True)
        inputs = {role: str(world.checkpoint(f"{role}-{hidden}", tensors)) for role, tensors in places}
        entries.append(inputs | {"method": "scale", "factor": 0.5, "output": str(world.root / f"out-{hidden}")})
    jobs = world.root / "jobs.yaml"
    jobs.write_text(json.dumps({"jobs": entries}))
    batch(jobs, quiet=True)
    for hidden, (aligned, tuned) in models.items():
        out = load_tensors(world.root / f"out-{hidden}")
        for name, tensor in aligned.items():
            expected = (tensor.double() + tuned[name].double()) / 2
            torch.testing.assert_close(out[name].double(), expected, rtol=2**-8, atol=0)


def test_a_large_tensor_is_cast_in_strips(world: Any, embedding_of_40_mib: dict[str, Any], load_tensors: Any) -> None:
    base = load_tensors(embedding_of_40_mib["aligned"])
    unaligned = world.checkpoint("unaligned", {n: t * 2 for n, t in base.items()})
    common = embedding_of_40_mib | {"unaligned": unaligned, "output": world.root / "out", "threshold": 0.1}
    safelora(**common, dtype="float32")
    out, tuned = load_tensors(world.root / "out"), load_tensors(embedding_of_40_mib["finetuned"])
    assert torch.equal(out["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"].float())


def test_infinity_in_a_late_strip_is_named(world: Any, embedding_of_40_mib: dict[str, Any], load_tensors: Any) -> None:
    tensors = load_tensors(embedding_of_40_mib["finetuned"])
    tensors["model.embed_tokens.weight"][-1, -1] = torch.inf
    broken = world.checkpoint("broken", tensors)
    with pytest.raises(RunError, match=r"broken/model\.safetensors: model\.embed_tokens\.weight holds NaN or infinity"):
        scale(**embedding_of_40_mib | {"finetuned": broken}, output=world.root / "out", factor=0.25)
    assert not (world.root / "out").exists()


def test_results_do_not_depend_on_the_budget(world: Any, load_tensors: Any) -> None:
    paths = world.trio(layers=3)
    outputs: list[Path] = []
    for memory in ("19MiB", "1GiB"):
        outputs.append(world.root / memory)
        scale(
            aligned=paths["aligned"],
            adapter=paths["adapter"],
            output=outputs[-1],
            factor=0.3,
            memory=memory,
            quiet=True,
        )
    one, two = ((o / "adapter_model.safetensors").read_bytes() for o in outputs)
    assert one == two


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it apart")
def test_the_peak_is_not_that_of_the_process_that_started_it() -> None:
    """Linux counts what a process held before it became another one into `ru_maxrss`: a notebook's gigabytes."""
    large = "import os, sys; held = bytearray(b'x' * (900 << 20)); os.execv(sys.executable, sys.argv[1:])"
    peak = "from safeshard.streamer.run.ending.finish import peak_host_bytes; print(peak_host_bytes())"
    words = [sys.executable, "-c", large, sys.executable, "-c", peak]
    told = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert 10 << 20 < told < 800 << 20
