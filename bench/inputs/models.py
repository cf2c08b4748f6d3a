"""Synthetic models of real shapes: the unaligned and fine-tuned versions differ from the aligned one as real ones do,
by a fraction of a weight.

A checkpoint larger than the disk is made by repeating its first layers: each layer has a file of its own, whose header
is its own and whose data is that of another layer. What reads the model reads all of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeshard.bench.inputs.synthetic import BLOCK, SCALES, File, Folder, Sizes, Values, check, make
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.adapter import WEIGHTS
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.inputs.lora_config import CONFIG

SHARD_BYTES = 5 << 30
FP8_BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model or, with `experts`, of a Qwen3-MoE one, whose experts are `inner` wide.

    `head` is the width of a head where that is not hidden / heads. With `fp8`, linears are stored as Qwen and DeepSeek
    release them, a scale for each 128 x 128.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head: int = 0
    experts: int = 0
    fp8: bool = False

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Module name inside a layer -> (out features, in features)."""
        q, kv = self.head_dim * self.heads, self.head_dim * self.kv_heads
        inside = {
            "gate_proj": (self.inner, self.hidden), "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }  # fmt: skip
        paths = [f"mlp.experts.{n}" for n in range(self.experts)] or ["mlp"]
        return {
            "self_attn.q_proj": (q, self.hidden), "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, q),
            **{f"{path}.{name}": size for path in paths for name, size in inside.items()},
        }  # fmt: skip

    @property
    def layer(self) -> Sizes:
        """The tensors of a layer of a checkpoint, by their names inside it."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, (rows, columns) in self.projections.items():
            found[f"{name}.weight"] = ("F8_E4M3" if self.fp8 else "BF16", (rows, columns))
            if self.fp8:
                found[f"{name}{SCALES}"] = ("F32", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{norm}.weight"] = ("BF16", (self.hidden,))
        if self.experts:
            found["mlp.gate.weight"] = ("BF16", (self.experts, self.hidden))
            found |= {f"self_attn.{each}_norm.weight": ("BF16", (self.head_dim,)) for each in "qk"}
        return found

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says, but for the number of layers."""
        said: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM" if self.experts else "LlamaForCausalLM"],
            "model_type": "qwen3_moe" if self.experts else "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }  # fmt: skip
        if self.experts:
            said |= {
                "head_dim": self.head_dim, "num_experts": self.experts, "moe_intermediate_size": self.inner,
                "num_experts_per_tok": min(8, self.experts), "norm_topk_prob": True,
            }  # fmt: skip
        if self.fp8:
            block = [FP8_BLOCK, FP8_BLOCK]
            said["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
        return said


SHAPES = {
    "llama-tiny": Shape(64, 176, 3, 4, 2, 256),
    "llama-1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-70b": Shape(8192, 28672, 80, 64, 8, 32000),
    "moe-tiny": Shape(64, 48, 3, 4, 2, 256, head=32, experts=4),
    "moe-tiny-fp8": Shape(64, 48, 3, 4, 2, 256, head=32, experts=4, fp8=True),
    "moe-30b-a3b": Shape(2048, 768, 48, 32, 4, 151936, head=128, experts=128),
    "moe-30b-a3b-fp8": Shape(2048, 768, 48, 32, 4, 151936, head=128, experts=128, fp8=True),
}


def prepare(
    folder: Path, name: str, layers: int | None = None, *, repeat: int | None = None, adapters: int = 1,
    rank: int = 16, finetuned: bool = False,
) -> tuple[str, dict[str, Path]]:  # fmt: skip
    """Make a model of a named shape in a folder of its own below `folder`; return a label and the paths by name.

    Raises:
        RequestError: as `make_models`, or `repeat` is not below the number of layers.
    """
    shape = SHAPES[name]
    layers = layers or shape.layers
    if repeat and repeat >= layers:
        raise RequestError(Offence("--repeat", "", f"fewer than the {layers} layers of {name}", str(repeat)))
    below = folder / (f"{name}-x{layers}" + f"-{repeat}-real" * bool(repeat))
    paths = make_models(below, shape, layers=layers, repeat=repeat, adapters=adapters, rank=rank, finetuned=finetuned)
    return f"{name} x{layers} layers" + f", {repeat} real" * bool(repeat), paths


def make_models(
    folder: Path, shape: Shape, *, layers: int, repeat: int | None = None, adapters: int, rank: int, finetuned: bool
) -> dict[str, Path]:
    """Write `aligned`, `unaligned`, `safe` and `adapter-0`, ... below `folder`; full `finetuned` ones on request.

    Existing folders are kept. Weights are bf16 or fp8, adapters fp32, as PEFT saves them. With `repeat`, layer i of a
    checkpoint, but not of an adapter, holds the values of layer i mod `repeat`.

    Raises:
        RequestError: an existing folder holds another model, or an unfinished one; the disk has too little room.
    """
    checkpoints = ("aligned", "unaligned", *(("finetuned", "finetuned-safe") * finetuned))
    folders = {
        folder / name: _checkpoint(shape, layers, repeat, Values(0, seed or None, 0.02))
        for seed, name in enumerate(checkpoints)
    }
    folders |= {
        folder / name: _adapter(shape, layers, rank, Values(100 + seed, None, 0.01))
        for seed, name in enumerate(["safe", *(f"adapter-{i}" for i in range(adapters))])
    }
    check(folder, folders)
    for path, content in folders.items():
        if not path.exists():
            make(path, content)
    return {path.name: path for path in folders}


def _checkpoint(shape: Shape, layers: int, repeat: int | None, values: Values) -> Folder:
    matrix = ("BF16", (shape.vocab, shape.hidden))
    parts = [{f"model.layers.{n}.{name}": size for name, size in shape.layer.items()} for n in range(layers)]
    outer = {
        "model.embed_tokens.weight": matrix,
        "model.norm.weight": ("BF16", (shape.hidden,)),
        "lm_head.weight": matrix,
    }
    shards = [outer, *parts] if repeat else _filled([outer, *parts])
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    files = {
        name: File(
            shard, BLOCK if repeat else 8,
            names[1 + (number - 1) % repeat] if repeat and number > repeat else None,
        )
        for number, (name, shard) in enumerate(zip(names, shards, strict=True))
    }  # fmt: skip
    config = {**shape.config, "num_hidden_layers": layers}
    texts = {"config.json": json.dumps(config, indent=2)}
    if len(shards) > 1:
        weight_map = {tensor: name for name, file in files.items() for tensor in file.sizes}
        texts[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map})
    return Folder(files, texts, values)


def _filled(parts: Sequence[Sizes]) -> list[Sizes]:
    """The tensors of all parts in as few shards as their order allows."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = SHARD_BYTES
    for name, size in (pair for part in parts for pair in part.items()):
        nbytes = File({name: size}).nbytes
        if nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = size
        room -= nbytes
    return [*shards]


def _adapter(shape: Shape, layers: int, rank: int, values: Values) -> Folder:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for name, (rows, columns) in shape.projections.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = ("F32", (rank, columns))
            tensors[f"{key}.lora_B.weight"] = ("F32", (rows, rank))
    targets = list(dict.fromkeys(name.rpartition(".")[2] for name in shape.projections))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    return Folder({WEIGHTS: File(tensors)}, {CONFIG: json.dumps(config, indent=2)}, values)
