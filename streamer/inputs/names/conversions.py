"""Names inside of layers: families that store their tensors under other names than transformers gives them.

EXAONE stores `transformer.h.3.attn.attention.q_proj`, transformers calls it `model.layers.3.self_attn.q_proj`; Mistral
publishes `layers.3.attention.wq`. A conversion reads a stored name as transformers' own. What the table below does not
know, transformers' own conversion mapping may, where that is installed. Only names are converted: what transformers
splits, fuses or reorders besides is another tensor.

The order of rows is a case of its own. In Mistral's files, as in Meta's, the rows of wq and wk go in pairs, which
transformers' rotary embedding wants apart: see `Checkpoint.interleaved`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

from safeshard.streamer.extras import require_transformers

Renaming = Callable[[str], str]
Pairs = tuple[tuple[str, str], ...]

OWN = "mistral"  # the family of what Mistral and Meta publish beside, or instead of, transformers' layout
OWN_LAYER = re.compile(r"layers\.\d{1,9}\.attention\.w[qk]\.weight")
OWN_EMBEDDING = "tok_embeddings.weight"

# What torch.compile, FSDP and activation checkpointing add to names, wherever a module was wrapped.
WRAPPER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."

_KIMI: Pairs = (
    (r"self_attn\.f_a_proj\.", "self_attn.forget_gate.f_a_proj."),
    (r"self_attn\.f_b_proj\.", "self_attn.forget_gate.f_b_proj."),
    (r"self_attn\.dt_bias", "self_attn.forget_gate.dt_bias"),
    (r"self_attn\.A_log", "self_attn.forget_gate.A_log"),
)
# `model_type` -> patterns of stored names and what stands in their place, one after another, each once a name. As in
# transformers' conversion_mapping.py, but for Mistral's and Yi's, which it leaves to scripts, and for experts.
TABLE: Mapping[str, Pairs] = {
    OWN: (
        (r"^layers\.", "model.layers."),
        (r"^norm\.", "model.norm."),
        (r"^tok_embeddings\.", "model.embed_tokens."),
        (r"^output\.", "lm_head."),
        (r"^vision_encoder\.", "vision_tower."),
        (r"^vision_language_adapter\.w_in\.", "multi_modal_projector.linear_1."),
        (r"^vision_language_adapter\.w_out\.", "multi_modal_projector.linear_2."),
        (r"^pre_mm_projector_norm\.", "multi_modal_projector.norm."),
        (r"^patch_merger\.", "multi_modal_projector.patch_merger."),
        (r"(?<=\d)\.attention\.wq\.", ".self_attn.q_proj."),
        (r"(?<=\d)\.attention\.wk\.", ".self_attn.k_proj."),
        (r"(?<=\d)\.attention\.wv\.", ".self_attn.v_proj."),
        (r"(?<=\d)\.attention\.wo\.", ".self_attn.o_proj."),
        (r"(?<=\d)\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"(?<=\d)\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"(?<=\d)\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"^(model\.layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
        (r"^(model\.layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
        (r"^(vision_tower\..*\d)\.(?:self_attn|attention)\.", r"\1.attention."),
        (r"^(vision_tower\..*\d)\.mlp\.", r"\1.feed_forward."),
    ),
    "exaone": (
        (r"^transformer\.wte\.", "model.embed_tokens."),
        (r"^transformer\.h\.", "model.layers."),
        (r"^transformer\.ln_f\.", "model.norm."),
        (r"\.attn\.attention\.", ".self_attn."),
        (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
        (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
    "lfm3": ((r"\.self_attn\.gate_proj\.", ".self_attn.g_proj."),),
    "yi": (  # before it took Llama's names
        (r"(?<=\d)\.ln1\.", ".input_layernorm."),
        (r"(?<=\d)\.ln2\.", ".post_attention_layernorm."),
    ),
    "kimi_linear": (*_KIMI, (r"\.block_sparse_moe\.", ".mlp.")),
    "sarvam_moe": (
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.", ".self_attn."),
        (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        (r"\.self_attn\.query_layernorm\.", ".self_attn.q_norm."),
        (r"\.self_attn\.key_layernorm\.", ".self_attn.k_norm."),
        (r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    ),
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
    "phimoe": ((r"\.block_sparse_moe\.", ".mlp."), (r"\.gate\.weight", ".router.weight")),
}  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """How a family's stored names read in transformers.

    Attributes:
        family: whose names are converted.
        forward: a stored name -> transformers' own, which stays as it is.
        backward: transformers' own -> the stored name, as far as that can be told.
    """

    family: str
    forward: Renaming
    backward: Renaming


def conversions(model_types: Iterable[str], names: Iterable[str]) -> Iterable[Conversion]:
    """The conversions that may explain the names of models of these types."""
    names, kinds = list(names), dict.fromkeys(model_types)
    wrapped = re.compile(rf"(?:^|(?<=\.)){WRAPPER}")
    if any(map(wrapped.search, names)):
        yield Conversion("a wrapper", partial(wrapped.sub, ""), str)  # which names had one, nobody knows
    if any(name == OWN_EMBEDDING or OWN_LAYER.fullmatch(name) for name in names):
        kinds = {OWN: None} | kinds
    if "llama" in kinds:
        kinds["yi"] = None
    for kind in kinds:
        if (found := _of_table(kind) or _of_transformers(kind)) is not None:
            yield found


@cache
def _of_table(kind: str) -> Conversion | None:
    pairs = TABLE.get(kind)
    if pairs is None:
        return None
    compiled = [(re.compile(pattern), new) for pattern, new in pairs]

    def forward(name: str) -> str:
        for pattern, new in compiled:
            name = pattern.sub(new, name, count=1)
        return name

    reverse = [(re.compile(f"{'^' * old.startswith('^')}{re.escape(new)}"), _literal(old)) for old, new in pairs[::-1]
               if "\\1" not in new]  # fmt: skip

    def backward(name: str) -> str:
        found = name
        for pattern, old in reverse:
            found = pattern.sub(old, found, count=1)
        return found if forward(found) == name else name

    return Conversion(kind, forward, backward)


def _literal(pattern: str) -> str:
    """What a pattern without choices matches."""
    return re.sub(r"\(\?<=[^)]*\)|\^", "", pattern).replace("\\.", ".")


@cache
def _of_transformers(kind: str) -> Conversion | None:
    """What transformers knows of a family, where it is installed and recent enough to have such a mapping."""
    try:
        require_transformers()
        mapping: Any = import_module("transformers.conversion_mapping")
        loading: Any = import_module("transformers.core_model_loading")
        known = mapping.get_checkpoint_conversion_mapping(kind) or ()
        found = [each for each in known if isinstance(each, loading.WeightRenaming)]
        if not found or any(isinstance(each, loading.GroupWeightRename) for each in found):  # which looks at all names
            return None
        backwards = [each.reverse_transform() for each in found[::-1]]
    except Exception:  # an older release, or a newer one with another inside: then there is no mapping
        return None

    def chain(steps: list[Any]) -> Renaming:
        def renamed(name: str) -> str:
            for step in steps:
                name = step.rename_source_key(name)[0]
            return name

        return renamed

    return Conversion(kind, chain(found), chain(backwards))
