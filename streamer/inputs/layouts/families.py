"""How families of models store their routed experts where these are fused in one tensor, by `model_type`.

From transformers' modeling files and conversion tables. A family that is not here is refused: what a fused tensor
means can be read off neither its name nor its sizes, and a guess loses deltas without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GATE_UP = "gate_up_proj"
ROLES = ("gate_proj", "up_proj", "down_proj")
# What an expert's linears are called where they are stored apart.
SYNONYMS = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}
# Under which names the block that holds the experts goes, on disk and in memory.
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "ffn")
_TAILS = {f"experts.{role}": role for role in (GATE_UP, *ROLES)}


@dataclass(frozen=True)
class Family:
    """A layout of fused experts: E x O x I, gate rows first, then up, unless it says otherwise.

    Attributes:
        transposed: E x I x O.
        interleaved: gate and up rows take turns.
        tails: how the tensors' names end -> what they hold.
        memory_transposed: in transformers' model it is E x I x O too.
        says_transposed: and the model says so (`is_transposed`), which PEFT asks for.
        saved_straight: releases are transposed, and transformers saves E x O x I; it reads both, by their sizes.
    """

    transposed: bool = False
    interleaved: bool = False
    tails: Mapping[str, str] = field(default_factory=lambda: _TAILS)
    memory_transposed: bool = False
    says_transposed: bool = False
    saved_straight: bool = False


_FUSED = Family()
_GRANITE = Family(tails=_TAILS | {"input_linear.weight": GATE_UP, "output_linear.weight": "down_proj"})
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_omni_moe"),
            *("qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
            *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "kimi_k2", "kimi_k25"),
            *("mixtral", "minimax", "minimax_m2", "phimoe", "olmoe", "flex_olmo", "gemma4", "gemma4_text"),
            *("ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe", "jamba", "dots1", "exaone_moe", "longcat_flash"),
            *("solar_open", "afmoe", "nemotron_h", "mimo_v2_flash", "hy_v3"),
        ),
        _FUSED,
    ),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), Family(transposed=True, saved_straight=True)),
    **dict.fromkeys(("llama4", "llama4_text"), Family(transposed=True, memory_transposed=True)),
    "gpt_oss": Family(transposed=True, interleaved=True, memory_transposed=True, says_transposed=True),
}


def model_type(config: Mapping[str, Any]) -> str:
    """The language model's `model_type`, "" where config.json has none."""
    text = config.get("text_config")
    named = (text.get("model_type") if isinstance(text, dict) else None) or config.get("model_type")
    return named if isinstance(named, str) else ""
