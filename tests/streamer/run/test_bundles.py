"""Which modules are treated in one step: few experts that lie apart, many that share what is read."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from safeshard.streamer.run.flow.bundles import BUNDLE_BYTES, NEAR_BYTES, bundles, bytes_apart

MIB = 1 << 20


def tasks_of(reads: Mapping[str, Mapping[str, int]]) -> Any:
    """A task for each module, with what it reads: key -> bytes."""

    def task(of: Mapping[str, int]) -> SimpleNamespace:
        found = [SimpleNamespace(key=key, ref=SimpleNamespace(nbytes=nbytes)) for key, nbytes in of.items()]
        return SimpleNamespace(reads=lambda: iter(found), places=lambda: iter(()))

    return {name: [task(of)] for name, of in reads.items()}


def names(experts: int, layer: int = 0) -> list[str]:
    roles = ("down_proj", "gate_proj", "up_proj")
    return [f"model.layers.{layer}.mlp.experts.{n}.{role}" for n in range(experts) for role in roles]


def test_experts_apart_are_few_on_a_cpu_and_many_on_a_device() -> None:
    tasks = tasks_of({name: {name: 3 * MIB} for name in names(32)})
    for device in ("cpu", "cuda"):
        apart = bytes_apart(torch.device(device))
        found = [*bundles(tasks, apart)]
        assert [name for bundle in found for name in bundle] == list(tasks)
        assert {len(bundle) for bundle in found[:-1]} == {apart // (3 * MIB)}
    assert bytes_apart(torch.device("cpu")) == NEAR_BYTES < bytes_apart(torch.device("cuda")) == BUNDLE_BYTES


def test_experts_that_share_a_tensor_are_many_though_their_neighbour_reads_another() -> None:
    """Fused LoRA: B of all experts is one tensor, of gate and up another than of down. Each is read once a bundle."""
    b_of = {"down_proj": "B of down", "gate_proj": "B of gate and up", "up_proj": "B of gate and up"}
    reads = {name: {name: 2 * MIB, b_of[name.rpartition(".")[2]]: 6 * MIB} for name in names(32)}
    found = [*bundles(tasks_of(reads), NEAR_BYTES)]
    assert max(map(len, found)) == (BUNDLE_BYTES - 12 * MIB) // (2 * MIB)
    assert len(found) == 2


def test_another_layer_and_another_linear_begin_anew() -> None:
    modules = [*names(1), *names(1, layer=1), "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    found = [*bundles(tasks_of({name: {name: 1} for name in modules}), NEAR_BYTES)]
    assert found == [modules[:3], modules[3:6], modules[6:7], modules[7:]]
