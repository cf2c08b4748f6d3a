"""The experts of a decoder layer: which of transformers' modules hold them, and what one expert computes.

Since release 5 transformers holds a layer's experts in one module, which is called with the tokens and, for each of
them, which experts it goes to and with which weights; `_apply_gate` is what lies between the two products. With that
alone one expert's part is computed from its own weights, so that the fused parameters are never built.

Llama 4 is the exception: its block repeats all tokens for every expert, scaled by the router. Here each expert is given
the tokens that its router picks, scaled likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.layouts import FAMILIES, ROLES, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safeshard.streamer.calibration.model.weights import Expert

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")  # what holds all experts' weights
# The names under which configurations count their experts.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
Route = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, their experts, the weights of these -> outputs


@dataclass(frozen=True)
class Experts:
    """All experts of one layer.

    Attributes:
        path: in the checkpoint's names: `model.layers.3.mlp.experts`.
        module: transformers' module of them.
        block: Llama 4's block, whose forward has to be another; None for all others.
        roles: each linear of an expert and its shape, O x I.
        interleaved: gate and up take turns in what `_apply_gate` is given.
    """

    path: str
    module: nn.Module
    block: nn.Module | None
    count: int
    roles: Mapping[str, tuple[int, int]]
    interleaved: bool

    @property
    def width(self) -> int:
        """Numbers of a token that an expert is given, and gives."""
        return self.roles["up_proj"][1]

    @property
    def inner(self) -> int:
        """Inputs of the last linear."""
        return self.roles["down_proj"][1]

    @property
    def scales_inputs(self) -> bool:
        """Whether the router scales what an expert is given, not what it gives."""
        return self.block is not None

    def between(self, x: Tensor, expert: Expert, index: int) -> Tensor:
        """The inputs of an expert's last linear (n x inner), for its own inputs `x` (n x width)."""
        bias = getattr(self.module, "gate_up_proj_bias", None)
        outputs = [nn.functional.linear(x, w) for w in (expert.gate, expert.up) if w is not None]
        # As the module's own product would be laid out.
        both = torch.stack(outputs, 2).flatten(1) if self.interleaved else torch.cat(outputs, 1)
        if bias is not None:
            both = both + bias[index]
        if self.block is not None:
            gate, up = outputs
            return up * self.module.act_fn(gate)  # type: ignore[operator, no-any-return]
        apply = self.module._apply_gate if expert.gate is not None else self.module.act_fn
        return apply(both)  # type: ignore[operator, no-any-return]

    def after(self, h: Tensor, expert: Expert, index: int) -> Tensor:
        """What an expert gives (n x width), for the inputs of its last linear."""
        y = nn.functional.linear(h, expert.down)
        bias = getattr(self.module, "down_proj_bias", None)
        return y if bias is None else y + bias[index]

    @contextmanager
    def routed_to(self, route: Route) -> Iterator[None]:
        """Inside, `route` computes what the experts give."""

        def experts(*args: Any, **kwargs: Any) -> Tensor:
            tokens, index, weights = (*args, *kwargs.values())
            return route(tokens, index, weights)

        def block(hidden: Tensor) -> tuple[Tensor, Tensor]:
            flat = hidden.reshape(-1, hidden.shape[-1])
            scores, logits = self.block.router(flat)  # type: ignore[union-attr, operator]
            weights, index = scores.topk(self.block.top_k, dim=1)  # type: ignore[union-attr]
            routed = route(flat, index, weights)
            return self.block.shared_expert(flat).add_(routed), logits  # type: ignore[union-attr, operator]

        module: nn.Module = self.module if self.block is None else self.block
        module.forward = experts if self.block is None else block
        try:
            yield
        finally:
            del module.forward


def find_experts(folder: Path, config: Any, layers: Mapping[str, nn.Module]) -> dict[str, Experts]:
    """Layer -> its experts, of layers that have any; their path is that inside of the layer.

    Raises:
        RequestError: a layer has experts of a kind that cannot be run one at a time.
    """
    kind = config.get_text_config().model_type
    family = FAMILIES.get(kind, Family())
    found: dict[str, Experts] = {}
    for layer, module in layers.items():
        for path, inner in module.named_modules():
            if not _holds_experts(path, inner, config):
                continue
            experts = _experts(module, path, inner, family)
            if experts is None or layer in found:
                place = f"{layer}.{path} ({type(inner).__name__})"
                raise _refuse(folder, f"{kind}, with experts that no code here runs: {place}")
            found[layer] = experts
    return found


def _holds_experts(path: str, module: nn.Module, config: Any) -> bool:
    """Whether a module holds several experts' weights, stacked or in a list. Other parameters may have three axes."""
    last = path.rpartition(".")[2]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return last == "experts" and len(module) > 0
    stacked = any(p.ndim > 2 for p in module.parameters(recurse=False)) and not isinstance(module, _CONVOLUTIONS)
    text = config.get_text_config()
    counted = any((getattr(text, key, None) or 0) > 1 for key in COUNTS)
    return stacked and (counted or last == "experts")


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def _experts(layer: nn.Module, path: str, module: nn.Module, family: Family) -> Experts | None:
    """How a module of experts is called; None where it is none that is known."""
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    gated = "gate_up_proj" in parameters
    first = parameters.get("gate_up_proj" if gated else "up_proj")
    down = parameters.get("down_proj")
    block = layer.get_submodule(path.rpartition(".")[0])
    llama4 = all(hasattr(block, name) for name in ("router", "shared_expert", "top_k")) and family.memory_transposed
    known = hasattr(module, "_apply_gate") or (llama4 and gated)
    if first is None or down is None or len(parameters) != 2 or not known:
        return None
    if getattr(module, "has_post_expert_norm", False) or any(list(each.parameters()) for each in module.children()):
        return None
    transposed = getattr(module, "is_transposed", family.memory_transposed)
    width, inner = (first.shape[1], down.shape[1]) if transposed else (first.shape[2], down.shape[2])
    roles = dict.fromkeys(ROLES[: 2 if gated else 0], (inner, width)) or {"up_proj": (inner, width)}
    interleaved = not getattr(module, "is_concatenated", not family.interleaved)
    own = None if hasattr(module, "_apply_gate") else block
    return Experts(path, module, own, first.shape[0], roles | {"down_proj": (width, inner)}, interleaved)


def _refuse(folder: Path, got: str) -> RequestError:
    expected = "experts as transformers 5 holds them: one module, called with tokens, experts and weights"
    remedy = "transformers 5 or newer, if this is an older one; SafeMERGE and SafeLoRA run no model"
    return RequestError(Offence(str(folder / "config.json"), expected=expected, got=got, remedy=remedy))
