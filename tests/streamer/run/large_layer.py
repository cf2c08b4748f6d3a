"""One layer of a large mixture of experts as sparse files: right sizes and headers, a few random rows an expert."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from safeshard.manifests.safetensors_header import layout

EXPERTS = "model.layers.0.mlp.experts"


def write(folder: Path, seed: int, experts: int, hidden: int, width: int) -> Path:
    """A checkpoint whose fused experts, E x 2 width x hidden and E x hidden x width, take room only where rows are."""
    folder.mkdir()
    config = {
        "model_type": "qwen3_5_moe_text", "hidden_size": hidden, "moe_intermediate_size": width,
        "num_experts": experts, "num_hidden_layers": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    header, places = layout(
        "model.safetensors", [(f"{EXPERTS}.{name}", "BF16", shape) for name, shape in shapes.items()], {"format": "pt"}
    )
    generator = torch.Generator().manual_seed(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for ref in places.values():
            rows, columns = ref.shape[1:]
            for expert in range(experts):
                for row in (0, rows // 2):
                    file.seek(ref.offset + 2 * columns * (expert * rows + row))
                    values = torch.randn(columns, generator=generator).bfloat16()
                    file.write(values.view(torch.uint8).numpy().tobytes())
        file.truncate(max(ref.offset + ref.nbytes for ref in places.values()))
    return folder


def adapter(folder: Path, experts: int, hidden: int, width: int, rank: int) -> Path:
    """PEFT's LoRA on both fused parameters."""
    folder.mkdir()
    torch.manual_seed(0)
    prefix = f"base_model.model.{EXPERTS}"
    tensors = {
        f"{prefix}.base_layer.lora_A.weight": torch.randn(experts * rank, hidden) * 0.01,
        f"{prefix}.base_layer.lora_B.weight": torch.randn(2 * width, experts * rank) * 0.01,
        f"{prefix}.lora_A.weight": torch.randn(experts * rank, width) * 0.01,
        f"{prefix}.lora_B.weight": torch.randn(hidden, experts * rank) * 0.01,
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "peft_version": "0.21.2", "r": rank, "lora_alpha": rank, "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
