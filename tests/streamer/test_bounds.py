"""Memory: what is in flight never exceeds --memory, whatever the number of layers or of jobs."""

from __future__ import annotations

import random
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
from safeshard.streamer import safelora, safemerge, scale
from safeshard.streamer.stream import GRAIN, Buffers, Clock, Read, Step, run_steps

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


def test_a_cast_copy_that_does_not_fit_is_refused_up_front(world: Any) -> None:
    """A tensor that is only taken over needs memory too where its dtype changes."""
    aligned = world.llama(1, seed=1) | {"model.embed_tokens.weight": torch.randn(1 << 18, 24).bfloat16()}
    moved = {n: (t.float() + 0.01).bfloat16() for n, t in aligned.items()}
    places = {r: world.checkpoint(r, moved if i else aligned) for i, r in enumerate(("aligned", "finetuned"))}
    places["unaligned"] = world.checkpoint("unaligned", {n: t * 2 for n, t in aligned.items()})
    common = places | {"output": world.root / "out", "threshold": 0.1, "quiet": True, "memory": 30 * MEBI}
    with pytest.raises(RequestError, match=r"model\.embed_tokens\.weight"):
        safelora(**common, dtype="float32")
    assert not list(world.root.glob("out*"))
    assert safelora(**common).manifest is not None


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
