"""Every expert's Gram by the plainest way: transformers' own forward, whose experts' inputs are hooked, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Plain:
    """What comes to one expert over all samples: rows of its inputs and of its last linear's, routed and of all."""

    routed: list[Tensor]
    inner: list[Tensor]
    every: list[Tensor]
    every_inner: list[Tensor]

    def grams(self, samples: int) -> dict[str, tuple[int, float, Tensor]]:
        """ "in" and "inner" -> tokens, share of the Gram of all, and the Gram, by the rule of docs/experts.md."""
        found = {}
        for name, rows, every in (("in", self.routed, self.every), ("inner", self.inner, self.every_inner)):
            x, y = torch.cat(rows).double(), torch.cat(every).double()
            own, shared, tokens = x.T @ x, y.T @ y, len(x)
            needed = max(0.005 * len(y), own.shape[0] / 4)
            share = max(0.0, 1 - tokens / needed)
            if share:
                like = own.trace() / shared.trace() if tokens else 1 / len(y)
                own = (1 - share) * own + share * like * shared
            found[name] = (tokens, share, own * 2 / samples)
        return found


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every layer's experts."""
    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter):
            yield name, module


def between(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    """The inputs of an expert's last linear, from the model's own parameters."""
    first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
    llama4 = not hasattr(module, "_apply_gate")
    y = x @ first[expert] if llama4 or module.is_transposed else x @ first[expert].T
    if hasattr(module, "gate_up_proj_bias"):
        y = y + module.gate_up_proj_bias[expert]
    if llama4:
        gate, up = y.chunk(2, -1)
        return up * module.act_fn(gate)
    return module._apply_gate(y) if hasattr(module, "gate_up_proj") else module.act_fn(y)


def run(model: nn.Module, tokens: list[list[int]]) -> dict[tuple[str, int], Plain]:
    """(Path of a layer's experts, expert) -> what comes to it when the whole model runs, sample by sample."""
    found: dict[tuple[str, int], Plain] = {}
    for _, module in experts_of(model):  # any size runs so
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"

    def hook(name: str, module: nn.Module, values: list[Tensor]) -> None:
        count = len(module.down_proj)
        for expert in range(count):
            if len(values) == 1:  # Llama 4: every token for every expert, scaled by the router
                scaled = values[0].view(count, -1, values[0].shape[-1])
                every, scales = _unscaled(scaled)
                x = scaled[expert][scales[expert] > 0]
            else:
                every, index, _ = values
                x = every[(index == expert).any(1)]
            kept = found.setdefault((name, expert), Plain([], [], [], []))
            kept.routed.append(x)
            kept.inner.append(between(module, x, expert))
            kept.every.append(every)
            kept.every_inner.append(between(module, every, expert))

    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: hook(name, m, [*args, *kwargs.values()]), with_kwargs=True
        )
        for name, module in experts_of(model)
    ]
    blocks = [m for m in model.modules() if type(m).__name__ == "Llama4TextMoe"]
    handles += [m.register_forward_pre_hook(lambda _, args: _given.append(args[0].flatten(0, -2))) for m in blocks]
    with torch.no_grad():
        for sample in tokens:
            model(input_ids=torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


_given: list[Tensor] = []  # to the last block of Llama 4


def _unscaled(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """What a block of Llama 4 was given, and each expert's scale for each of its tokens."""
    x = _given[-1]
    return x, (scaled.norm(dim=-1) / x.norm(dim=-1))
