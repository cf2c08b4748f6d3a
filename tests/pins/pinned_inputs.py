"""The inputs of the pinned jobs: tiny models, adapters and calibration data, of the same bytes on every machine.

All values are sums of whole numbers from a generator whose stream is frozen, divided by powers of two: no function that
rounds differently elsewhere takes part. Nothing here is shared with other tests, so that their changes change no pin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
HIDDEN, KV, INNER, VOCAB, LAYERS = 24, 12, 40, 32, 2
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2,
    "n_positions": 64, "vocab_size": VOCAB, "torch_dtype": "float32",
}  # fmt: skip
LLAMA_LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
GPT2_LINEARS = {  # (O, I); stored I x O
    "attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN), "mlp.c_fc": (4 * HIDDEN, HIDDEN),
    "mlp.c_proj": (HIDDEN, 4 * HIDDEN),
}  # fmt: skip


def randoms(seed: int) -> Callable[..., Tensor]:
    """A function of a shape: fp32, near normal, of standard deviation about 0.6; exact multiples of 1/256."""
    stream = np.random.RandomState(seed)  # the one whose stream never changes

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(stream.randint(-128, 129, (4, *shape)).sum(0).astype(np.float32)) / 256

    return draw


def llama(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A Llama, by tensor name."""
    draw = randoms(seed)
    tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "lm_head.weight": draw(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = 1 + draw(HIDDEN) / 8
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = 1 + draw(HIDDEN) / 8
        for name, shape in LLAMA_LINEARS.items():
            tensors[f"{prefix}.{name}.weight"] = draw(*shape) / 2
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def gpt2(seed: int) -> Tensors:
    """A GPT-2 in fp32, whose linears are stored transposed."""
    draw = randoms(seed)
    tensors = {"wte.weight": draw(VOCAB, HIDDEN), "wpe.weight": draw(64, HIDDEN) / 8}
    for norm in ("ln_f", *(f"h.{layer}.{norm}" for layer in range(LAYERS) for norm in ("ln_1", "ln_2"))):
        tensors |= {f"{norm}.weight": 1 + draw(HIDDEN) / 8, f"{norm}.bias": draw(HIDDEN) / 8}
    for layer in range(LAYERS):
        for name, (rows, columns) in GPT2_LINEARS.items():
            tensors |= {f"h.{layer}.{name}.weight": draw(columns, rows) / 4, f"h.{layer}.{name}.bias": draw(rows) / 8}
    return tensors


def moved(tensors: Mapping[str, Tensor], seed: int, size: float) -> Tensors:
    """The tensors plus random ones of `size`, a power of two, in their dtype."""
    draw = randoms(seed)
    return {name: (t.float() + draw(*t.shape) * size).to(t.dtype) for name, t in tensors.items()}


def pairs(linears: Mapping[str, tuple[int, int]], prefix: str, seed: int, ranks: Callable[[str], int]) -> Tensors:
    """A and B (fp32) of every linear of every layer, under PEFT's names."""
    draw, tensors = randoms(seed), {}
    for layer in range(LAYERS):
        for name, (rows, columns) in linears.items():
            key = f"base_model.model.{prefix}.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = draw(ranks(name), columns)
            tensors[f"{key}.lora_B.weight"] = draw(rows, ranks(name)) / 8
    return tensors


def write_model(folder: Path, tensors: Tensors, config: Mapping[str, Any], shards: int = 1) -> None:
    """A checkpoint of one file, or of shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(places.values())):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_adapter(folder: Path, tensors: Tensors, rank: int = 4, **config: Any) -> None:
    """An adapter; `config` overrides keys of adapter_config.json."""
    folder.mkdir(parents=True)
    targets = sorted({key.split(".")[-3] for key in tensors if ".lora_A." in key})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "pinned", "r": rank,
        "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def write_inputs(root: Path) -> None:
    """All inputs, as folders of `root`: bf16 Llamas in one file, in shards, with a tied head and in fp32; a GPT-2."""
    _write_checkpoints(root)
    llama_pairs = {"linears": LLAMA_LINEARS, "prefix": "model.layers"}
    write_adapter(root / "adapter", pairs(**llama_pairs, seed=11, ranks=lambda name: 4))
    write_adapter(root / "other-adapter", pairs(**llama_pairs, seed=12, ranks=lambda name: 4), lora_alpha=5)
    write_adapter(root / "safe-adapter", pairs(**llama_pairs, seed=13, ranks=lambda name: 4))
    write_adapter(root / "small-safe-adapter", pairs(**llama_pairs, seed=14, ranks=lambda name: 2), rank=2)
    half = {name: t.bfloat16() for name, t in pairs(**llama_pairs, seed=15, ranks=lambda name: 4).items()}
    write_adapter(root / "half-adapter", half)
    # What PEFT's configs can say: rsLoRA, ranks and alphas by module, and a head that was trained whole.
    uneven = pairs(**llama_pairs, seed=16, ranks=lambda name: 6 if "down_proj" in name else 4)
    head = {"base_model.model.lm_head.weight": llama(8)["lm_head.weight"]}
    write_adapter(
        root / "uneven-adapter", uneven | head, use_rslora=True, rank_pattern={"down_proj": 6},
        alpha_pattern={"q_proj": 3}, modules_to_save=["lm_head"],
    )  # fmt: skip
    gpt2_pairs = pairs(GPT2_LINEARS, "transformer.h", seed=17, ranks=lambda name: 4)
    write_adapter(root / "gpt2/adapter", gpt2_pairs, fan_in_fan_out=True)
    stream = np.random.RandomState(21)
    rows = [stream.randint(VOCAB, size=length).tolist() for length in (5, 11, 1, 7, 12, 3, 9, 20, 16, 13)]
    (root / "data.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def _write_checkpoints(root: Path) -> None:
    aligned = llama(1)
    models = {
        "aligned": aligned,
        "unaligned": moved(aligned, 2, 2**-2),
        "finetuned": moved(aligned, 3, 2**-4),
        "safe": moved(aligned, 4, 2**-4),
    }
    precise = llama(5, torch.float32)
    in_gpt2 = gpt2(6)
    for seed, (role, tensors) in enumerate(models.items(), 31):
        write_model(root / role, tensors, LLAMA)
        write_model(root / "sharded" / role, tensors, LLAMA, shards=3)
        untied = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
        write_model(root / "tied" / role, untied, LLAMA | {"tie_word_embeddings": True})
        size = 0 if role == "aligned" else 2**-2 if role == "unaligned" else 2**-6
        write_model(root / "fp32" / role, moved(precise, seed, size), LLAMA | {"torch_dtype": "float32"})
        write_model(root / "gpt2" / role, moved(in_gpt2, seed, size), GPT2)
