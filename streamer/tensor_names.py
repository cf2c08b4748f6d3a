"""The order of tensors' names: layers by number, parts of a decoder as they run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

# Parts of decoder names in the order they run, for people who read lists; other names follow alphabetically.
_RUNS = {
    part: place
    for place, part in enumerate(
        (
            *("model", "transformer", "embed_tokens", "wte", "wpe", "layers", "h", "input_layernorm", "ln_1"),
            *("self_attn", "attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj"),
            *("post_attention_layernorm", "ln_2", "mlp", "gate_proj", "up_proj", "gate_up_proj", "c_fc", "down_proj"),
            *("c_proj", "norm", "ln_f", "lm_head"),
        )
    )
}


@lru_cache(1 << 16)  # models have tens of thousands of names, each of which is asked for often
def layer_of(name: str) -> int | None:
    """The first number in a dotted name: the layer (`model.layers.3.mlp.up_proj` -> 3), None outside of layers."""
    return next((int(part) for part in name.split(".") if _is_number(part)), None)


def by_layer(values: Mapping[str, float | None]) -> dict[str, list[float]]:
    """The values of modules that have one, by their layers in order; "other" of those outside of layers, last."""
    found: dict[int, list[float]] = {}
    other = []
    for name, value in values.items():
        if value is not None and (layer := layer_of(name)) is not None:
            found.setdefault(layer, []).append(value)
        elif value is not None:
            other.append(value)
    layers = {str(layer): found[layer] for layer in sorted(found)}
    return layers | ({"other": other} if other else {})


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key for dotted names: numbers as numbers, and what decoders commonly hold in the order it runs."""
    return tuple(map(_place, name.split(".")))


@lru_cache(1 << 12)
def _place(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if _is_number(part) else (1, _RUNS.get(part, len(_RUNS)), part)


def _is_number(part: str) -> bool:
    """Whether a part of a name counts layers or experts; what is longer than any count is plain text."""
    return part.isascii() and part.isdecimal() and len(part) < 10
