"""Synthetic models of real shapes, written straight into safetensors at disk speed.

The values are random and never zero, and the unaligned and fine-tuned versions differ from the aligned one as real ones
do, by a fraction of a weight. They repeat after a few million elements, which no measurement here can notice.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import TensorRef, layout
from safeshard.streamer.adapter import CONFIG, WEIGHTS
from safeshard.streamer.checkpoint import INDEX

SHARD_BYTES = 5 << 30
Sizes = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype and shape
POOL = (1 << 22) + 1  # odd, so that tensors start at ever new places of the pool


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


class _Values:
    """An endless stream of values around zero: aligned weights, or those plus a delta."""

    def __init__(self, seed: int, delta_seed: int | None, scale: float, dtype: torch.dtype) -> None:
        pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)) * scale
        if delta_seed is not None:
            pool += torch.randn(POOL, generator=torch.Generator().manual_seed(delta_seed)) * scale / 10
        self._pool, self._at = pool.to(dtype), 0

    def take(self, count: int) -> Iterator[Tensor]:
        """The next `count` values, in pieces."""
        while count:
            piece = self._pool[self._at : self._at + count]
            yield piece
            count -= len(piece)
            self._at = (self._at + len(piece)) % POOL


def prepare(
    folder: Path, name: str, layers: int | None = None, *, adapters: int = 1, rank: int = 16, finetuned: bool = False
) -> tuple[str, dict[str, Path]]:
    """Make a model of a named shape in a folder of its own below `folder`; return a label and the paths by name."""
    shape = SHAPES[name]
    layers = layers or shape.layers
    below = folder / f"{name}-x{layers}"
    paths = make_models(below, shape, layers=layers, adapters=adapters, rank=rank, finetuned=finetuned)
    return f"{name} x{layers} layers", paths


def make_models(
    folder: Path, shape: Shape, *, layers: int, adapters: int, rank: int, finetuned: bool
) -> dict[str, Path]:
    """Write `aligned`, `unaligned`, `safe` and `adapter-0`, ... below `folder`; full `finetuned` ones on request.

    Existing folders are kept. Weights are bf16, adapters fp32, as PEFT saves them.

    Raises:
        RequestError: an existing folder holds another model, or an unfinished one.
    """
    paths = {name: folder / name for name in ("aligned", "unaligned", *(("finetuned", "finetuned-safe") * finetuned))}
    for seed, path in enumerate(paths.values()):
        _make_checkpoint(path, shape, layers, _Values(0, seed or None, 0.02, torch.bfloat16))
    for seed, name in enumerate(["safe", *(f"adapter-{i}" for i in range(adapters))]):
        paths[name] = folder / name
        _make_adapter(paths[name], shape, layers, rank, _Values(100 + seed, None, 0.01, torch.float32))
    return paths


def _make_checkpoint(path: Path, shape: Shape, layers: int, values: _Values) -> None:
    tensors = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)} | {
        f"model.layers.{layer}.{name}.weight": size
        for layer in range(layers)
        for name, size in shape.projections.items()
    }
    norms = [f"model.layers.{n}.{kind}_layernorm.weight" for n in range(layers) for kind in ("input", "post_attention")]
    sizes: dict[str, tuple[int, ...]] = {**tensors, **dict.fromkeys([*norms, "model.norm.weight"], (shape.hidden,))}
    sizes["lm_head.weight"] = (shape.vocab, shape.hidden)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in sizes.items():
        if sum(2 * torch.Size(s).numel() for s in shards[-1].values()) + 2 * torch.Size(size).numel() > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    weight_map: dict[str, str] = {}
    files: dict[str, Sizes] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file] = {name: ("BF16", size) for name, size in shard.items()}
        weight_map |= dict.fromkeys(shard, file)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    texts = {"config.json": json.dumps(config, indent=2)}
    if len(shards) > 1:
        texts[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map})
    _make(path, files, texts, values)


def _make_adapter(path: Path, shape: Shape, layers: int, rank: int, values: _Values) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for name, (rows, columns) in shape.projections.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = ("F32", (rank, columns))
            tensors[f"{key}.lora_B.weight"] = ("F32", (rows, rank))
    targets = [name.rpartition(".")[2] for name in shape.projections]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    _make(path, {WEIGHTS: tensors}, {CONFIG: json.dumps(config, indent=2)}, values)


def _make(path: Path, files: Mapping[str, Sizes], texts: Mapping[str, str], values: _Values) -> None:
    """Write a folder whole or not at all; one that is there must hold the same."""
    if path.exists():
        if not _is_made(path, files, texts):
            got = "another one, or an unfinished one"
            raise RequestError(Offence("--folder", str(path), "the model asked for", got, "remove it"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as scratch:
        folder = Path(scratch, path.name)
        folder.mkdir()
        for name, sizes in files.items():
            _write(folder / name, sizes, values)
        for name, text in texts.items():
            (folder / name).write_text(text)
        folder.rename(path)


def _is_made(path: Path, files: Mapping[str, Sizes], texts: Mapping[str, str]) -> bool:
    return (
        all((path / name).is_file() for name in (*files, *texts))
        and all((path / name).read_text() == text for name, text in texts.items())
        and all(_has_layout(path / name, sizes) for name, sizes in files.items())
    )


def _layout(file: str, sizes: Sizes) -> tuple[bytes, dict[str, TensorRef]]:
    return layout(file, [(name, dtype, size) for name, (dtype, size) in sizes.items()], {"format": "pt"})


def _has_layout(path: Path, sizes: Sizes) -> bool:
    header, refs = _layout(path.name, sizes)
    with path.open("rb") as file:
        same_header = file.read(len(header)) == header
    return same_header and path.stat().st_size == len(header) + sum(ref.nbytes for ref in refs.values())


def _write(path: Path, sizes: Sizes, values: _Values) -> None:
    header, refs = _layout(path.name, sizes)
    with path.open("wb") as file:
        file.write(header)
        for ref in sorted(refs.values(), key=lambda ref: ref.offset):
            for piece in values.take(torch.Size(ref.shape).numel()):
                file.write(piece.view(torch.uint8).numpy().data)
