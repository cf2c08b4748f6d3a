"""Tensors that an input may lack: releases store what transformers never builds, and so no fine-tuned model has it.

Everything else that is missing is a lost part of a checkpoint, and refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.tensor_names import layer_of

# Buffers that old transformers releases saved and new ones do not; they are recomputed and carry no training.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|embeddings\.position_ids"
    r"|attn\.(attention\.)?(bias|masked_bias)|layers\.[0-9]+\.attention\.(bias|masked_bias))"
)
_SHARED_KV = re.compile(r".*\.self_attn\.(k_proj|v_proj|k_norm|v_norm)(\..*)?")
# Where a configuration may hold that of the language model inside.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

Config = Mapping[str, Any]


def text_config(config: Config) -> Config:
    """The configuration of the language model: a part of a multimodal model's, else the whole."""
    for key in _TEXT_CONFIGS:
        if isinstance(inner := config.get(key), dict):
            return text_config(inner)
    return config


def unbuilt(config: Config) -> Callable[[str], str]:
    """Why transformers never builds a tensor of a release with this config.json, by its name; "" for all others."""
    text = text_config(config)
    layers, shared = (_count(text.get(key)) for key in ("num_hidden_layers", "num_kv_shared_layers"))

    def reason(name: str) -> str:
        part, layer = part_of(name), layer_of(name)
        if part == "prediction" or (part == "" and layer is not None and layers and layer >= layers):
            return "transformers does not build layers for multi-token prediction"
        if part == "" and layer is not None and layers and shared and layer >= layers - shared:
            return "the layer takes its keys and values from another" if _SHARED_KV.fullmatch(name) else ""
        return "it is a buffer" if BUFFERS.fullmatch(name) else ""

    return reason


def excused(ours: Collection[str], theirs: Collection[str], aligned: Config, other: Config) -> dict[str, str]:
    """Of our tensors, those that an input may lack and does, with the reason; both by our names.

    What is never built is lacked as a whole: of a kind of it that is there in part, the rest was lost. Neither does a
    save of the language model alone have a vision tower, nor does its configuration say that there is one: a part of a
    model is excused where nothing of it is there and the configuration has no word of it.
    """
    reason, found = unbuilt(aligned), {}
    kinds: dict[str, set[str]] = {}
    there = set(theirs)
    for name in ours:
        if why := reason(name):
            kinds.setdefault(_kind(name), set()).add(name)
            if name not in there:
                found[name] = why
    for kind, names in kinds.items():
        if kind and not names.isdisjoint(there):
            for name in names:
                found.pop(name, None)
    gone = sorted(_part_configs(aligned) - _part_configs(other)) if other else []
    if gone:
        parts = {"connector", *map(part_of, gone)} - {part_of(name) for name in there}
        why = f"its config.json has no {', '.join(gone)}"
        found |= {name: why for name in ours if name not in found and part_of(name) in parts}
    return found


def _kind(name: str) -> str:
    """What is there or lacking as one: layers for prediction as a whole, of shared layers each tensor over all layers.

    Nothing ("") of a buffer, nor of what such layers may share with the model: embeddings and head.
    """
    if BUFFERS.fullmatch(name) or re.search(r"(embed_tokens|head)\.weight$", name):
        return ""
    match = _SHARED_KV.fullmatch(name)
    return f"{match[1]}{match[2] or ''}" if match and part_of(name) == "" else "prediction"


def _part_configs(config: Config) -> set[str]:
    """Keys of the configurations of a model's parts, the language model aside."""
    inner = {key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {key for key in inner if part_of(key)}


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
