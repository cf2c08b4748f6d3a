"""A small manifest with every field in use, and a small output folder written byte by byte."""

import hashlib
import json
import struct
from datetime import datetime, timezone
from pathlib import Path

import pytest
from blake3 import blake3

from safeshard.manifests import (
    Fallback,
    FileEntry,
    Input,
    InputFile,
    Manifest,
    Method,
    ModuleEntry,
    Run,
    TensorEntry,
    Tool,
)

DATA = Path(__file__).parent / "data"
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
COSINES = (0.3123456, 0.5201, 0.41, -0.0212, 0.3500004, 0.27)


@pytest.fixture
def data() -> Path:
    return DATA


@pytest.fixture
def example() -> Manifest:
    """A SafeMERGE adapter job over two layers of three modules."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]
    gated = [
        ModuleEntry(
            name=name,
            decision="merged" if cosine < 0.35 else "kept",
            cosine=cosine,
            threshold=0.35,
            near_threshold=True if abs(cosine - 0.35) < 1e-6 else None,
            weights=(0.8, 0.2) if cosine < 0.35 else None,
            rank=16,
        )
        for name, cosine in zip(names, COSINES, strict=True)
    ]
    undefined = ModuleEntry(name="lm_head", decision="kept", threshold=0.35, note="the delta is zero")
    return Manifest(
        tool=Tool(safeshard="0.1.0", torch="2.4.0", triton="3.0.0", device="cpu"),
        method=Method(
            name="safemerge",
            paper="https://arxiv.org/abs/2503.17239",
            options={"threshold": 0.35, "weights": [0.8, 0.2], "combine": "linear", "density": None},
            seed=0,
        ),
        inputs={
            "aligned": Input(
                source="hf://org/chat",
                revision="0123abc",
                files=(InputFile(name="model.safetensors", size=4096, header_sha256="1" * 64),),
            ),
            "adapter": Input(
                source="/home/someone/adapter",
                files=(InputFile(name="adapter_config.json", size=512, blake3="2" * 64),),
            ),
        },
        modules=(*gated, undefined),
        tensors=(
            TensorEntry(
                name="base_model.model.lm_head.lora_A.weight",
                file="adapter_model.safetensors",
                dtype="F32",
                shape=(16, 64),
                action="new",
                blake3="3" * 64,
            ),
        ),
        files=(
            FileEntry(name="adapter_model.safetensors", size=4224, header_sha256="4" * 64),
            FileEntry(name="adapter_config.json", size=300, blake3="5" * 64),
        ),
        fallbacks=(Fallback(asked="triton", done="torch", why="no CUDA device", subject="lm_head"),),
        run=Run(
            start=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
            wall_s=3.5,
            bytes_read=3_900_000_000,
            bytes_written=4524,
            peak_host_bytes=700_000_000,
            peak_device_bytes=0,
            peak_buffer_bytes=268_435_456,
            seconds={"read": 1.25, "gate": 2.0},
        ),
    )


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file after the format's own description; the header is padded with spaces to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in tensors.values())


@pytest.fixture
def output(tmp_path: Path, example: Manifest) -> Path:
    """An output folder with two shards, one of them in a subfolder, a config, and the manifest that describes it."""
    folder = tmp_path / "output"
    shards = {
        "model-1.safetensors": {"a.weight": ("F32", [2, 3], bytes(range(24))), "b.bias": ("U8", [5], b"12345")},
        "more/model-2.safetensors": {"c.weight": ("BF16", [2, 0], b""), "d.weight": ("BF16", [1, 2], b"\0\1\2\3")},
    }
    files, tensors = [], []
    for name, content in shards.items():
        raw = safetensors_bytes(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        files.append(FileEntry(name=name, size=len(raw), header_sha256=hashlib.sha256(raw[:end]).hexdigest()))
        tensors += [
            TensorEntry(name=t, file=name, dtype=d, shape=tuple(s), action="copied", blake3=blake3(c).hexdigest())
            for t, (d, s, c) in content.items()
        ]
    config = b'{"model_type": "llama"}\n'
    (folder / "config.json").write_bytes(config)
    files.append(FileEntry(name="config.json", size=len(config), blake3=blake3(config).hexdigest()))
    manifest = example.model_copy(update={"files": tuple(files), "tensors": tuple(tensors)})
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder
