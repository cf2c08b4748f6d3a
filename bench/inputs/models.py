"""Synthetic models of real shapes: the unaligned and fine-tuned versions differ from the aligned one as real ones do,
by a fraction of a weight.

A checkpoint larger than the disk is made by repeating its first layers: each layer has a file of its own, whose header
is its own and whose data is that of another layer. What reads the model reads all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safeshard.bench.inputs.synthetic import BLOCK, File, Folder, Values, check, make
from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.adapter import WEIGHTS
from safeshard.streamer.inputs.checkpoint import INDEX
from safeshard.streamer.inputs.lora_config import CONFIG

SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Module name inside a layer -> (out features, in features)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden), "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden), "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }  # fmt: skip


SHAPES = {
    "llama-tiny": Shape(64, 176, 3, 4, 2, 256),
    "llama-1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-70b": Shape(8192, 28672, 80, 64, 8, 32000),
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

    Existing folders are kept. Weights are bf16, adapters fp32, as PEFT saves them. With `repeat`, layer i of a
    checkpoint, but not of an adapter, holds the values of layer i mod `repeat`.

    Raises:
        RequestError: an existing folder holds another model, or an unfinished one; the disk has too little room.
    """
    checkpoints = ("aligned", "unaligned", *(("finetuned", "finetuned-safe") * finetuned))
    folders = {
        folder / name: _checkpoint(shape, layers, repeat, Values(0, seed or None, 0.02, torch.bfloat16))
        for seed, name in enumerate(checkpoints)
    }
    folders |= {
        folder / name: _adapter(shape, layers, rank, Values(100 + seed, None, 0.01, torch.float32))
        for seed, name in enumerate(["safe", *(f"adapter-{i}" for i in range(adapters))])
    }
    check(folder, folders)
    for path, content in folders.items():
        if not path.exists():
            make(path, content)
    return {path.name: path for path in folders}


def _checkpoint(shape: Shape, layers: int, repeat: int | None, values: Values) -> Folder:
    hidden, matrix = (shape.hidden,), (shape.vocab, shape.hidden)
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), hidden)
    parts = [
        {f"model.layers.{n}.{name}.weight": size for name, size in {**shape.projections, **norms}.items()}
        for n in range(layers)
    ]
    outer = {"model.embed_tokens.weight": matrix, "model.norm.weight": hidden, "lm_head.weight": matrix}
    shards = [outer, *parts] if repeat else _filled([outer, *parts])
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    files = {
        name: File(
            {tensor: ("BF16", size) for tensor, size in shard.items()}, BLOCK if repeat else 8,
            names[1 + (number - 1) % repeat] if repeat and number > repeat else None,
        )
        for number, (name, shard) in enumerate(zip(names, shards, strict=True))
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    texts = {"config.json": json.dumps(config, indent=2)}
    if len(shards) > 1:
        weight_map = {tensor: name for name, file in files.items() for tensor in file.sizes}
        texts[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map})
    return Folder(files, texts, values)


def _filled(parts: Sequence[dict[str, tuple[int, ...]]]) -> list[dict[str, tuple[int, ...]]]:
    """The bf16 tensors of all parts in as few shards as their order allows."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, size in (pair for part in parts for pair in part.items()):
        nbytes = 2 * math.prod(size)
        if nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = size
        room -= nbytes
    return shards


def _adapter(shape: Shape, layers: int, rank: int, values: Values) -> Folder:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for name, (rows, columns) in shape.projections.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = ("F32", (rank, columns))
            tensors[f"{key}.lora_B.weight"] = ("F32", (rows, rank))
    targets = [name.rpartition(".")[2] for name in shape.projections]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    return Folder({WEIGHTS: File(tensors)}, {CONFIG: json.dumps(config, indent=2)}, values)
