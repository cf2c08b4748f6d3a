"""Queries and keys as Mistral and Meta publish them: the rows that a rotary embedding turns together lie in pairs.

Transformers turns row j of a head with row j + D/2, so that its rows lie in halves; the same numbers in another order.
Every checkpoint whose names are Mistral's own is read, and written, as transformers orders it.

Shapes: a weight is (heads * D) x I, D the size of a head. Row 2j + e of a head as stored is row j + e D/2 as read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.layouts.views import Part, Stored, View
from safeshard.streamer.inputs.names.conversions import OWN_EMBEDDING, OWN_LAYER
from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.inputs.names.unbuilt import text_config

PAIRED = re.compile(r"(?:.*\.)?layers\.\d{1,9}\.attention\.w[qk]")


def interleaved(names: Collection[str], config: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, int]:
    """Module -> size of its heads, 0 where that is not known, of the queries and keys that are stored in pairs.

    `config` is config.json, `params` Mistral's own params.json; each {} where there is none.
    """
    if OWN_EMBEDDING not in names or not any(map(OWN_LAYER.fullmatch, names)):
        return {}
    vision = (_part(config, "vision_config"), _part(params, "vision_encoder"))
    sizes = {"": _head(text_config(config)) or _head(params), "vision": _head(vision[0]) or _head(vision[1])}
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return {
        module: 0 if f"{module}.bias" in names else sizes.get(part_of(module), 0)
        for module in modules
        if PAIRED.fullmatch(module)
    }


def in_halves(ref: TensorRef, head: int) -> Stored:
    """A weight in pairs, seen in halves: of each head the even rows, then the odd ones."""
    whole = Part({"values": ref}, (ref.shape[0], ref.shape[1]))
    heads = [whole.rows(start, start + head) for start in range(0, ref.shape[0], head)]
    views = [View(rows=(odd, head, 2)) for odd in (0, 1)]
    return Stored(tuple(Part(h.refs, h.stored, view=view, starts=h.starts) for h in heads for view in views))


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = config.get(key)
    return part if isinstance(part, dict) else {}


def _head(config: Mapping[str, Any]) -> int:
    """The size of a head that a configuration gives, 0 where it gives none that is even."""
    size = config.get("head_dim")
    if size is None:
        width = config.get("hidden_size", config.get("dim"))
        heads = config.get("num_attention_heads", config.get("n_heads"))
        if type(width) is int and type(heads) is int and heads > 0 and width % heads == 0:
            size = width // heads
    return size if type(size) is int and size > 0 and size % 2 == 0 else 0
