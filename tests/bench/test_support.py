"""The support table says what the planner does, cell by cell, and names tests that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safeshard.bench.support import KINDS, NONE, NOTED, REFUSED, YES, Kind
from safeshard.manifests.errors import RequestError
from safeshard.streamer.methods.safelora import SafeLora
from safeshard.streamer.methods.safemerge import SafeMerge
from safeshard.streamer.methods.scale import Scale
from safeshard.streamer.methods.score import Score
from safeshard.streamer.plan.planner import Planner

TESTS = Path(__file__).parent.parent
Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Builder:
    """The inputs of one kind by role; each is changed from a plain set of Llama-like ones."""

    def __init__(self, world: Any) -> None:
        self.world = world
        base = world.llama()
        self.base: Tensors = base
        self.full: dict[str, Tensors] = {
            role: self.moved(base, i) for i, role in enumerate(("aligned", "unaligned", "finetuned", "safe"))
        }
        self.configs: dict[str, dict[str, Any]] = {role: {"num_hidden_layers": 2} for role in self.full}
        self.pairs: dict[str, Tensors] = {
            role: world.pairs(base, 4, i) for i, role in enumerate(("adapter", "safe_adapter"))
        }
        self.lora: dict[str, dict[str, Any]] = {"adapter": {}, "safe_adapter": {}}

    def moved(self, tensors: Tensors, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return {
            n: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in tensors.items()
        }

    def all(self, change: Callable[[Tensors], Tensors], *roles: str) -> None:
        for role in roles or tuple(self.full):
            self.full[role] = change(self.full[role])

    def loras(self, change: Callable[[Tensors], Tensors], *roles: str) -> None:
        for role in roles or tuple(self.pairs):
            self.pairs[role] = change(self.pairs[role])

    def write(self) -> dict[str, str]:
        places = {
            role: self.world.checkpoint(role, tensors, **self.configs[role]) for role, tensors in self.full.items()
        }
        places |= {r: self.world.adapter(r, {}, tensors=t, **self.lora[r]) for r, t in self.pairs.items()}
        return {role: str(place) for role, place in places.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(old, new, 1): t for n, t in tensors.items()}


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def multimodal(b: Builder) -> None:
    b.all(lambda t: {f"language_model.{n}": v for n, v in t.items()} | {
        f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight": torch.randn(24, 24).bfloat16() for i in range(2)
    })  # fmt: skip
    for role in b.configs:
        b.configs[role] = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}, "vision_config": {}}


def prefixes(b: Builder) -> None:
    b.loras(renamed("model.model.model.", "model.model.language_model."))
    b.all(renamed("model.", "model.language_model."), "finetuned", "safe")


def towers(b: Builder) -> None:
    multimodal(b)
    b.all(renamed("language_model.model.", "model.language_model."), "finetuned", "safe")
    b.all(renamed("language_model.lm_head", "lm_head"), "finetuned", "safe")
    b.all(renamed("vision_tower.", "model.vision_tower."), "finetuned", "safe")
    path = "base_model.model.model.vision_tower.encoder.layers"
    shapes = {"A": (4, 24), "B": (24, 4)}
    pairs = {f"{path}.{i}.self_attn.q_proj.lora_{s}.weight": torch.ones(shapes[s]) for i in range(2) for s in "AB"}
    b.loras(renamed("model.model.model.", "model.model.language_model."))
    b.loras(lambda tensors: tensors | {name: t.clone() for name, t in pairs.items()})


def twins(b: Builder) -> None:
    b.all(lambda t: {f"{s}.{n}": v.clone() for s in ("left", "right") for n, v in t.items()}, "aligned", "unaligned")


def text_only(b: Builder) -> None:
    text = {role: dict(b.full[role]) for role in ("finetuned", "safe")}
    multimodal(b)
    b.full |= text
    for role in text:
        b.configs[role] = {"model_type": "gemma3_text"}


def mtp(b: Builder) -> None:
    b.all(
        lambda t: t | {"mtp.layers.0.self_attn.q_proj.weight": torch.randn(24, 24).bfloat16()}, "aligned", "unaligned"
    )


def shared_kv(b: Builder) -> None:
    for role in b.configs:
        b.configs[role] = {"num_hidden_layers": 2, "num_kv_shared_layers": 1}
    lacks = without(r"layers\.1\.self_attn\.[kv]_proj")
    b.all(lacks, "finetuned", "safe")
    b.loras(lacks)


def lost(b: Builder) -> None:
    b.all(without(r"layers\.1\.mlp"), "finetuned", "safe")
    b.loras(without(r"layers\.1\.mlp"))


def zero3(b: Builder) -> None:
    b.all(emptied, "finetuned")
    b.loras(emptied, "adapter")


def emptied(tensors: Tensors) -> Tensors:
    return {name: torch.zeros(0) if t.ndim > 1 else t for name, t in tensors.items()}


def more_rows(b: Builder) -> None:
    more = {n: torch.cat([b.full["aligned"][n], torch.ones(2, 24).bfloat16()]) for n in (EMBEDDING, HEAD)}
    b.all(lambda t: t | {n: v.clone() for n, v in more.items()}, "finetuned", "safe")
    b.loras(lambda t: t | {f"base_model.model.{n}": v.clone() for n, v in more.items()}, "adapter")


def padded_base(b: Builder) -> None:
    b.all(lambda t: t | {n: torch.ones(40, 24).bfloat16() for n in (EMBEDDING, HEAD)}, "unaligned")


def head_lora(b: Builder) -> None:
    pair = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 24),
        "base_model.model.lm_head.lora_B.weight": torch.ones(32, 4),
    }
    b.loras(lambda t: t | pair, "adapter")
    b.lora["adapter"] = {"target_modules": r".*"}
    padded_base(b)


def trained_head(b: Builder) -> None:
    b.loras(lambda t: t | {f"base_model.model.{HEAD}": torch.ones(32, 24)}, "adapter")
    b.lora["adapter"] = {"modules_to_save": ["lm_head"]}


def safe_resized(b: Builder) -> None:
    head = torch.cat([b.full["aligned"][HEAD].float(), torch.ones(1, 24)])
    b.loras(lambda t: t | {f"base_model.model.{HEAD}": head}, "safe_adapter")


def safe_trained(b: Builder) -> None:
    b.loras(lambda t: t | {f"base_model.model.{HEAD}": torch.ones(32, 24)}, "safe_adapter")


def embedding_lora(b: Builder) -> None:
    path = "base_model.model.model.embed_tokens.lora_embedding_"
    for role in b.pairs:
        b.loras(lambda t: t | {f"{path}A": torch.ones(4, 32), f"{path}B": torch.ones(24, 4)}, role)
        b.lora[role] = {"target_modules": r".*(_proj|embed_tokens)"}


def configured(**config: Any) -> Callable[[Builder], None]:
    def change(b: Builder) -> None:
        b.lora["adapter"] = config

    return change


BUILDERS: dict[str, Callable[[Builder], None]] = {
    "plain": lambda b: None, "prefixes": prefixes, "towers": towers, "twins": twins, "text_only": text_only, "mtp": mtp,
    "shared_kv": shared_kv, "lost": lost, "zero3": zero3, "more_rows": more_rows, "padded_base": padded_base,
    "head_of_other_rows": head_lora, "trained_head": trained_head, "safe_resized": safe_resized,
    "safe_trained": safe_trained, "embedding_lora": embedding_lora, "rslora": configured(use_rslora=True),
    "dora": configured(use_dora=True), "pissa": configured(init_lora_weights="pissa"),
}  # fmt: skip


def outcome(kind: type[Any], **options: Any) -> str:
    try:
        plan = Planner().plan_inputs(kind(**options))
    except RequestError:
        return REFUSED
    return NOTED if plan.fallbacks else YES


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_planner_does_what_the_table_says(world: Any, kind: Kind) -> None:
    builder = Builder(world)
    BUILDERS[kind.name](builder)
    at = builder.write()
    out = world.root / "out"
    if kind.scale_adapter:
        assert (
            outcome(Scale, aligned=at["aligned"], adapter=at["adapter"], factor=0.5, output=out) == kind.scale_adapter
        )
    gate = {"aligned": at["aligned"], "unaligned": at["unaligned"], "output": out}
    if kind.gate_adapter:
        merged = outcome(SafeMerge, **gate, adapter=at["adapter"], safe_adapter=at["safe_adapter"])
        assert merged == kind.gate_adapter
        if not kind.name.startswith("safe_"):
            assert outcome(SafeLora, **gate, adapter=at["adapter"], threshold=0.3) == kind.gate_adapter
            scored = outcome(Score, **gate | {"output": None}, adapter=at["adapter"])
            assert (scored == REFUSED) == (kind.gate_adapter == REFUSED)
    if kind.scale_full:
        scaled = outcome(Scale, aligned=at["aligned"], finetuned=at["finetuned"], factor=0.5, output=out)
        assert scaled == kind.scale_full
    if kind.gate_full:
        assert outcome(SafeMerge, **gate, finetuned=at["finetuned"], safe=at["safe"]) == kind.gate_full
        assert outcome(SafeLora, **gate, finetuned=at["finetuned"], threshold=0.3) == kind.gate_full


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_tests_that_a_row_names_are_there(kind: Kind) -> None:
    cells = {kind.scale_adapter, kind.gate_adapter, kind.scale_full, kind.gate_full}
    assert cells <= {YES, NOTED, REFUSED, NONE}
    assert kind.tests
    for named in kind.tests:
        file, _, function = named.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), named


def test_every_row_has_its_builder() -> None:
    assert {kind.name for kind in KINDS} == BUILDERS.keys()
