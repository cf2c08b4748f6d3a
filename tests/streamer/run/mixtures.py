"""Small mixtures of experts, saved as releases are laid out, and what their experts are by the model's own forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

COMMON = {
    "vocab_size": 67, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 12, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 10, "decoder_sparse_step": 1, "mlp_only_layers": []}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 14},
    "qwen3_moe": QWEN,
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 10, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 12,
        "head_dim": 4, "num_key_value_heads": 2,
    },
    "granitemoe": {"num_local_experts": 4},
    "qwen3_5_moe_text": QWEN
    | {"shared_expert_intermediate_size": 14, "layer_types": ["full_attention"] * 2, "linear_num_value_heads": 2,
       "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1,
                    "attention_chunk_size": 16},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2, "rope_scaling": None},
    "qwen3_vl_moe_text": QWEN,
}  # fmt: skip
CALIBRATED = {  # beside these, for their forward pass
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 10, "first_k_dense_replace": 1, "n_group": 1,
                 "topk_group": 1, "n_shared_experts": 1},
    "nemotron_h": {"n_routed_experts": 4, "moe_intermediate_size": 10, "layers_block_type": ["attention", "moe"],
                   "moe_shared_expert_intermediate_size": 14, "n_group": 1, "topk_group": 1},
}  # fmt: skip
FUSED = ("granitemoe", "qwen3_5_moe_text", "llama4_text", "gpt_oss", "qwen3_vl_moe_text")
ROLES = ("gate_proj", "up_proj", "down_proj")


def build(kind: str, seed: int, **sizes: Any) -> nn.Module:
    """A model of a family in fp32; every parameter random."""
    if kind == "qwen3_vl_moe_text":
        from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as vl

        config = vl.Qwen3VLMoeTextConfig(**COMMON | FAMILIES[kind] | sizes)
        torch.manual_seed(seed)
        model: nn.Module = vl.Qwen3VLMoeTextModel(config)
    else:
        config = transformers.AutoConfig.for_model(kind, **COMMON | (FAMILIES | CALIBRATED)[kind] | sizes)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.float().parameters():
        parameter.data.normal_(std=0.05)
    return model.eval()


def multimodal(seed: int, **sizes: Any) -> nn.Module:
    """Qwen3-VL-MoE as a whole."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    sees = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 24,
            "patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    text = COMMON | QWEN | {"rope_parameters": rope} | sizes
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=sees, tie_word_embeddings=False)
    torch.manual_seed(seed)
    model: nn.Module = transformers.Qwen3VLMoeForConditionalGeneration(config)
    for parameter in model.float().parameters():
        parameter.data.normal_(std=0.05)
    return model.eval()


def save(model: nn.Module, folder: Path, fused: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model as transformers does, or `fused` as it is in memory: Qwen3.5's releases are."""
    model = model.to(dtype)
    if fused:
        folder.mkdir()
        model.config.save_pretrained(folder)
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    else:
        model.save_pretrained(folder)
    if type(model).__name__.startswith("Qwen3VLMoe"):
        _as_released(folder)
    model.float()
    return folder


def _as_released(folder: Path) -> None:
    """Qwen3-VL-MoE, or the text model inside of it, stored as releases are: transposed."""
    tensors = load_file(folder / "model.safetensors")
    stacked = {n: t.transpose(1, 2).contiguous() if "experts" in n and t.ndim == 3 else t for n, t in tensors.items()}
    save_file(
        {n if n.startswith("model.") else f"model.{n}": t for n, t in stacked.items()}, folder / "model.safetensors"
    )


def experts(model: nn.Module) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, role) -> the weight (O x I) that the model's forward multiplies with."""
    found = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and name.endswith("experts")):
            continue
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        kind = model.config.model_type
        for expert in range(len(module.gate_up_proj)):
            both, down = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
            if kind in ("llama4_text", "gpt_oss"):  # states @ weight
                both, down = both.T, down.T
            gate, up = (both[::2], both[1::2]) if kind == "gpt_oss" else both.chunk(2)
            found |= {(layer, expert, role): w.clone() for role, w in zip(ROLES, (gate, up, down), strict=True)}
    return found


def role_of(module: str) -> tuple[int, int, str]:
    """(layer, expert, role) of a module's name."""
    numbers = [int(part) for part in module.split(".") if part.isdigit()]
    last = module.rpartition(".")[2]
    return numbers[0], numbers[1], {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(last, last)


def loaded(kind: str, folder: Path) -> nn.Module:
    """The model that transformers loads from a folder; every tensor of it must be used."""
    if kind == "qwen3_vl_moe_text":
        model = build(kind, 0)
        tensors = load_file(folder / "model.safetensors")
        own = {n.removeprefix("model."): t.transpose(1, 2) if t.ndim == 3 else t for n, t in tensors.items()}
        model.load_state_dict({n: t.contiguous() for n, t in own.items()})
        return model
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model


def gate(aligned: Tensor, unaligned: Tensor, delta: Tensor) -> tuple[float, Tensor]:
    """SafeLoRA's cosine, and the projected delta, by the formula with P formed, in fp64."""
    v = aligned.double() - unaligned.double()
    projection = v @ v.T / v.norm()
    projected = projection @ delta.double()
    return float((projected * delta).sum() / (projected.norm() * delta.double().norm())), projected


def manifest(folder: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content
