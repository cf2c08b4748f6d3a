"""Small checkpoints and adapters, written as Hub folders; and, without a GPU, Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set here, before any test imports one. Tests' folders
lie in memory where there is enough of it: a disk would be waited for, thousands of times.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

GOLDENS = Path(__file__).parent / "goldens"
PROJECTIONS = {
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}
Tensors = dict[str, Tensor]


class World:
    """Makes the folders of one test: an aligned checkpoint and what is derived from it. Seeded, Llama-like names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes = {"hidden": 24, "kv": 12, "inner": 40}

    def llama(self, layers: int = 2, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
        """Random tensors of a Llama-like decoder, by name."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        hidden = self.sizes["hidden"]
        tensors = {"model.embed_tokens.weight": random(32, hidden), "model.norm.weight": random(hidden)}
        tensors["lm_head.weight"] = random(32, hidden)
        for layer in range(layers):
            for name, (rows, columns) in PROJECTIONS.items():
                shape = (self.sizes[rows], self.sizes[columns])
                tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
            tensors[f"model.layers.{layer}.input_layernorm.weight"] = random(hidden)
        return tensors

    def checkpoint(self, name: str, tensors: Mapping[str, Tensor], shards: int = 1, **config: Any) -> Path:
        """Write a checkpoint folder of one file, or of shards with an index."""
        folder = self.root / name
        folder.mkdir(parents=True)
        config = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"} | config
        (folder / "config.json").write_text(json.dumps(config))
        names = sorted(tensors)
        if shards == 1:
            save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def trio(self, shards: int = 1, layers: int = 2, **config: Any) -> dict[str, Path]:
        """An aligned and an unaligned checkpoint, and two rank-4 adapters on all projections."""
        aligned = self.llama(layers, seed=1)
        unaligned = {n: (t.float() + 0.3 * torch.randn_like(t.float())).to(t.dtype) for n, t in aligned.items()}
        return {
            "aligned": self.checkpoint("aligned", aligned, shards, **config),
            "unaligned": self.checkpoint("unaligned", unaligned, shards, **config),
            "adapter": self.adapter("adapter", aligned, seed=2),
            "safe_adapter": self.adapter("safe", aligned, seed=3),
        }

    def pairs(self, tensors: Mapping[str, Tensor], rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
        """Random A and B for every projection in `tensors`, under PEFT's names."""
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, weight in tensors.items():
            if "_proj." in name:
                key = f"base_model.model.{name.removesuffix('.weight')}"
                pairs[f"{key}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator).to(dtype)
                pairs[f"{key}.lora_B.weight"] = (torch.randn(weight.shape[0], rank, generator=generator) / 9).to(dtype)
        return pairs

    def adapter(
        self,
        name: str,
        base: Mapping[str, Tensor],
        rank: int = 4,
        seed: int = 0,
        tensors: Tensors | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Path:
        """Write an adapter folder; `config` overrides keys of adapter_config.json."""
        folder = self.root / name
        folder.mkdir(parents=True)
        save_file(
            tensors or self.pairs(base, rank, seed, dtype), folder / "adapter_model.safetensors", {"format": "pt"}
        )
        targets = [name.rpartition(".")[2] for name in PROJECTIONS]
        config = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none",
            "base_model_name_or_path": "", "task_type": "CAUSAL_LM", "inference_mode": True,
        } | config  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def edit_config(self, folder: Path, **changes: Any) -> None:
        """Change keys of an adapter's config."""
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    return World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def load_tensors() -> Any:
    return tensors_of


@pytest.fixture
def golden(tmp_path: Path) -> Any:
    """Copy of a golden model's folder (its checkpoints are inputs that a test may change)."""

    def copy(name: str) -> Path:
        shutil.copytree(GOLDENS / name, tmp_path / name)
        return tmp_path / name

    return copy


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH in which `safeshard` and `python` are, which start at once."""
    with forked.commands(tmp_path_factory.mktemp("commands")) as folder:
        yield folder


@pytest.fixture(scope="session")
def python(path: Path) -> str:
    """In place of `sys.executable`, where it is not the start of a process that is tested."""
    return str(path / "python")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)
