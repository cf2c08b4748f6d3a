"""Small models stored as quantised releases are, and what they are decoded, by plain arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 8
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Parts = dict[str, Tensor]


def fp8_block(weight: Tensor) -> Parts:
    rows, columns = weight.shape
    values, scales = torch.empty(rows, columns), torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, BLOCK):
            block = weight[i : i + BLOCK, j : j + BLOCK]
            scale = scales[i // BLOCK, j // BLOCK] = block.abs().max() / 448
            values[i : i + BLOCK, j : j + BLOCK] = block / scale
    return {".weight": values.clamp(-448, 448).to(torch.float8_e4m3fn), ".weight_scale_inv": scales}


def fp8_row(weight: Tensor) -> Parts:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight / scales.float()).clamp(-448, 448)
    return {".weight": values.to(torch.float8_e4m3fn), ".weight_scale": scales}


def fp8_tensor(weight: Tensor) -> Parts:
    scale = weight.abs().max() / 448
    values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": values, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}


def int4(weight: Tensor) -> Parts:
    groups = weight.view(len(weight), -1, BLOCK)
    scales = (groups.abs().amax(2) / 7).bfloat16()
    codes = ((groups / scales.float()[..., None]).round().clamp(-8, 7) + 8).to(torch.int64).view(len(weight), -1, 8)
    words = sum(codes[..., k] << (4 * k) for k in range(8))
    assert isinstance(words, Tensor)
    return {
        ".weight_packed": words.to(torch.uint32).view(torch.int32), ".weight_scale": scales,
        ".weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of an O x I weight, as GPT-OSS stores an expert's."""
    groups = weight.view(len(weight), -1, 32)
    exponents = torch.ceil(torch.log2(groups.abs().amax(2) / 6))
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponents + 127).to(torch.uint8)


def decode_int4(parts: Parts) -> Tensor:
    words = parts[".weight_packed"].view(torch.uint32).to(torch.int64)
    codes = torch.stack([(words >> (4 * k)) & 15 for k in range(8)], 2).view(len(words), -1) - 8
    return codes * parts[".weight_scale"].double().repeat_interleave(BLOCK, 1)


def decode_fp8(parts: Parts) -> Tensor:
    values = parts[".weight"].float().double()
    if ".weight_scale_inv" in parts:
        scales = parts[".weight_scale_inv"].double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return values * scales[: len(values), : values.shape[1]]
    return values * parts[".weight_scale"].double()


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    table = torch.cat([E2M1, -E2M1]).double()
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    return (values * torch.exp2(scales.double() - 127)[..., None]).flatten(-2)


Format = tuple[Callable[[Tensor], Parts], Callable[[Parts], Tensor], dict[str, Any]]
FORMATS: dict[str, Format] = {
    "fp8 block": (fp8_block, decode_fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "fp8 row": (fp8_row, decode_fp8, {"quant_method": "compressed-tensors"}),
    "fp8 tensor": (fp8_tensor, decode_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int4": (int4, decode_int4, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "group_size": BLOCK, "symmetric": True}}}}),
}  # fmt: skip


def quantise(source: Path, folder: Path, format_: str) -> Path:
    """A checkpoint with every linear of its layers in a format; two shards, scales apart from their weights."""
    encode, _, said = FORMATS[format_]
    files: tuple[Parts, Parts] = ({}, {})
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and tensor.ndim == 2 and "gate.weight" not in name:
            for ending, part in encode(tensor.float()).items():
                files["scale" in ending][name.removesuffix(".weight") + ending] = part.contiguous()
        else:
            files[0][name] = tensor
    return write(folder, files, json.loads((source / "config.json").read_text()) | {"quantization_config": said})


def as_gpt_oss(source: Path, folder: Path) -> Path:
    """GPT-OSS with its experts in MXFP4, as released: O x I, where bf16 is I x O."""
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        parts = [mxfp4(expert.T.contiguous()) for expert in tensors.pop(name).float()]
        tensors[f"{name}_blocks"] = torch.stack([blocks for blocks, _ in parts])
        tensors[f"{name}_scales"] = torch.stack([scales for _, scales in parts])
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    return write(folder, (tensors, {}), config)


def write(folder: Path, files: tuple[Parts, Parts], config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if not files[1]:
        save_file(files[0], folder / "model.safetensors")
        return folder
    names = {n: f"model-{k}-of-2.safetensors" for k, tensors in enumerate(files, 1) for n in tensors}
    for number, tensors in enumerate(files, 1):
        save_file(tensors, folder / f"model-{number}-of-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def tensors(folder: Path) -> Parts:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def decoded(folder: Path, format_: str) -> Parts:
    """Module -> its weight in fp64, of what is quantised in a folder."""
    _, decode, _ = FORMATS[format_]
    stored, found = tensors(folder), {}
    ending = ".weight_scale_inv" if format_ == "fp8 block" else ".weight_scale"
    for name in (n for n in stored if n.endswith(ending)):
        module = name.removesuffix(ending)
        found[module] = decode({n.removeprefix(module): t for n, t in stored.items() if n.startswith(f"{module}.")})
    return found
