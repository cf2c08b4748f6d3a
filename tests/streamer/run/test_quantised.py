"""Quantised weights as aligned, unaligned and fine-tuned: decoded as the formats say, encoded where they changed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mixtures
import peft
import pytest
import quantised
import torch
import transformers
from safetensors.torch import load_file, save_file
from standin import stand_in
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.streamer import safelora, safemerge, scale, score

SIZES = {"hidden_size": 24, "moe_intermediate_size": 16, "head_dim": 16}
OSS = {"hidden_size": 32, "intermediate_size": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE, aligned, unaligned and fine-tuned, in bf16; the tuned one differs in one layer's rows alone."""
    root = tmp_path_factory.mktemp("plain")
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build("qwen3_moe", seed, **SIZES), root / role, dtype=torch.bfloat16)
    return root


@pytest.fixture(scope="module", params=quantised.FORMATS)
def stored(request: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The models in one format; `finetuned` is the aligned one, decoded, with the first 8 rows of each weight moved."""
    root = tmp_path_factory.mktemp("stored")
    for role in ("aligned", "unaligned"):
        quantised.quantise(models / role, root / role, request.param)
    tuned = dict(quantised.decoded(root / "aligned", request.param))
    generator = torch.Generator().manual_seed(3)
    for weight in tuned.values():
        weight[:8] += torch.randn(8, weight.shape[1], generator=generator) * 0.01
    plain = load_file(models / "aligned/model.safetensors")
    plain |= {f"{name}.weight": weight.float() for name, weight in tuned.items()}
    config = json.loads((models / "aligned/config.json").read_text())
    quantised.write(root / "finetuned", ({n: t.contiguous() for n, t in plain.items()}, {}), config)
    before = quantised.decoded(root / "aligned", request.param)  # the safe one moved twice as far
    plain |= {f"{name}.weight": (2 * weight - before[name]).float() for name, weight in tuned.items()}
    quantised.write(root / "safe", ({n: t.contiguous() for n, t in plain.items()}, {}), config)
    return request.param, root


def adapter(folder: Path, base: Path, targets: list[str]) -> Path:
    """A LoRA that PEFT saved, of random A and B."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, target_parameters=["experts.down_proj"])
    )
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    made.save_pretrained(folder)
    return folder


def test_adapter_jobs_on_quantised_models(models: Path, stored: tuple[str, Path], tmp_path: Path) -> None:
    """The cosines are those of the decoded weights, in fp64; nothing of the base is written."""
    format_, root = stored
    made = adapter(tmp_path / "adapter", models / "aligned", ["q_proj", "o_proj"])
    result = safelora(
        aligned=root / "aligned", unaligned=root / "unaligned", adapter=made, threshold=0.9, output=tmp_path / "out",
        quiet=True,
    )  # fmt: skip
    weights = [quantised.decoded(root / role, format_) for role in ("aligned", "unaligned")]
    pairs = load_file(made / "adapter_model.safetensors")
    assert len(result.cosines) == 2 * (2 + 4)
    for name, cosine in result.cosines.items():
        key = f"base_model.model.{name}"
        if ".experts." in name:
            _, expert, _ = mixtures.role_of(name)
            key = key.partition(".experts.")[0] + ".experts"
            a = pairs[f"{key}.lora_A.weight"].view(4, 2, -1)[expert]
            b = pairs[f"{key}.lora_B.weight"].view(-1, 2, 4)[:, :, expert]
        else:
            a, b = pairs[f"{key}.lora_A.weight"], pairs[f"{key}.lora_B.weight"]
        expected, _ = mixtures.gate(weights[0][name], weights[1][name], b.double() @ a.double())
        assert cosine == pytest.approx(expected, abs=1e-6), name
    kernel = "_product_kernel" if format_ == "int4" else "_coded_product_kernel"
    assert_alike_on_a_device(result.cosines, root, made, {kernel: 2 * len(result.cosines)})


def assert_alike_on_a_device(cosines: Any, root: Path, made: Path, launches: dict[str, int]) -> None:
    """Weights in their codes are decoded where they are multiplied with, without a wait; others are decoded before."""
    with stand_in() as device:
        (scored,) = score(
            aligned=root / "aligned", unaligned=root / "unaligned", adapter=made, quiet=True, device="cuda:1"
        )
    assert scored.cosines == pytest.approx(cosines, abs=1e-6)
    assert Counter(name for name in device.launches if name.endswith("product_kernel")) == launches
    waits = {wait.partition(" at ")[0] for wait in device.waits}
    assert "_coded_product_kernel" not in launches or waits <= {"copy down", "synchronize"}, device.waits


def test_a_checkpoint_job_encodes_only_blocks_that_changed(stored: tuple[str, Path], tmp_path: Path) -> None:
    format_, root = stored
    safemerge(
        aligned=root / "aligned", unaligned=root / "unaligned", finetuned=root / "finetuned", safe=root / "safe",
        threshold=2.0, weights=(0.25, 0.125), output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    before, after = quantised.tensors(root / "aligned"), quantised.tensors(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == quantised.FORMATS[format_][2]
    )
    aligned, new = (quantised.decoded(folder, format_) for folder in (root / "aligned", tmp_path / "out"))
    tuned = quantised.tensors(root / "finetuned")
    entries = {entry["name"]: entry for entry in mixtures.manifest(tmp_path / "out")["modules"]}
    assert entries.keys() == aligned.keys()
    values = ".weight_packed" if format_ == "int4" else ".weight"
    for module, weight in aligned.items():
        wanted = weight + 0.5 * (tuned[f"{module}.weight"].double() - weight)
        entry, rest = entries[module], slice(0 if format_ == "fp8 tensor" else 8, None)
        if format_ != "fp8 tensor":
            ours, theirs = (t[module + values][rest].view(torch.uint8) for t in (after, before))
            assert torch.equal(ours, theirs), module
        changed = wanted if format_ == "fp8 tensor" else wanted[:8]
        written = new[module][: len(changed)]
        error = float((written - changed).norm() / changed.norm())
        assert entry["encoding_error"] == pytest.approx(error, rel=1e-4), module
        assert 0 < error < (0.1 if format_ == "int4" else 0.04)
        count = {"fp8 tensor": (1, 1), "fp8 row": (len(weight), 8)}.get(format_)
        if count is None:
            columns = -(-weight.shape[1] // 8)
            tall = len(weight) if format_ == "int4" else -(-len(weight) // 8)
            count = (tall * columns, (8 if format_ == "int4" else 1) * columns)
        assert (entry["blocks"], entry["blocks_changed"]) == count, module


def test_the_aligned_weights_come_back_byte_for_byte(stored: tuple[str, Path], tmp_path: Path) -> None:
    """A factor of 0 gives the aligned model; a fine-tuned model in the same format that is kept gives its own bytes."""
    _, root = stored
    scale(aligned=root / "aligned", finetuned=root / "finetuned", factor=0, output=tmp_path / "zero", quiet=True)
    assert_same(quantised.tensors(tmp_path / "zero"), quantised.tensors(root / "aligned"))
    quantised.write(tmp_path / "other", (quantised.tensors(root / "unaligned"), {}),
                    json.loads((root / "unaligned/config.json").read_text()))  # fmt: skip
    safelora(
        aligned=root / "aligned", unaligned=root / "unaligned", finetuned=tmp_path / "other", threshold=-2.0,
        output=tmp_path / "kept", quiet=True,
    )  # fmt: skip
    assert_same(quantised.tensors(tmp_path / "kept"), quantised.tensors(root / "unaligned"))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        bits = [t.reshape(-1).view(torch.uint8) for t in (ours[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_dequantized_checkpoints(stored: tuple[str, Path], models: Path, tmp_path: Path, dtype: str | None) -> None:
    format_, root = stored
    scale(
        aligned=root / "aligned", finetuned=root / "finetuned", factor=0.5, dequantize=True, dtype=dtype,
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    written, like = quantised.tensors(tmp_path / "out"), load_file(models / "aligned/model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in like.items()}
    assert {t.dtype for t in written.values()} == {torch.float32 if dtype else torch.bfloat16}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    aligned, tuned = quantised.decoded(root / "aligned", format_), quantised.tensors(root / "finetuned")
    for module, weight in aligned.items():
        wanted = (weight + 0.5 * (tuned[f"{module}.weight"].double() - weight)).float()
        tolerance = 1e-7 if dtype else 2**-8
        torch.testing.assert_close(written[f"{module}.weight"].float(), wanted, rtol=tolerance, atol=1e-7)
    mixtures.loaded("qwen3_moe", tmp_path / "out")


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-OSS: aligned and unaligned in MXFP4, as released; fine-tuned in bf16, as transformers saves it."""
    root = tmp_path_factory.mktemp("oss")
    for seed, role in enumerate(("aligned", "unaligned", "finetuned"), 1):
        mixtures.save(mixtures.build("gpt_oss", seed, **OSS), root / f"{role}-plain", dtype=torch.bfloat16)
        quantised.as_gpt_oss(root / f"{role}-plain", root / role)
    return root


def oss_experts(folder: Path) -> dict[tuple[int, int, str], Tensor]:
    found = {}
    stored = quantised.tensors(folder)
    for name in (n for n in stored if n.endswith("_blocks")):
        layer = mixtures.role_of(f"{name}.0.x")[0]
        for expert in range(4):
            both = quantised.decode_mxfp4(stored[name][expert], stored[name.replace("_blocks", "_scales")][expert])
            if "gate_up" in name:
                found[layer, expert, "gate_proj"], found[layer, expert, "up_proj"] = both[::2], both[1::2]
            else:
                found[layer, expert, "down_proj"] = both
    return found


@pytest.mark.parametrize("tuned", ["finetuned-plain", "finetuned"])
def test_gpt_oss_experts(oss: Path, tmp_path: Path, tuned: str) -> None:
    places = {"aligned": oss / "aligned", "unaligned": oss / "unaligned", "finetuned": oss / tuned, "quiet": True}
    safelora(**places, threshold=2.0, output=tmp_path / "out")
    aligned, unaligned, new = (oss_experts(folder) for folder in (oss / "aligned", oss / "unaligned", tmp_path / "out"))
    plain = mixtures.experts(mixtures.loaded("gpt_oss", oss / "finetuned-plain"))
    theirs = oss_experts(oss / tuned) if tuned == "finetuned" else {p: w.double() for p, w in plain.items()}
    entries = {
        mixtures.role_of(e["name"]): e for e in mixtures.manifest(tmp_path / "out")["modules"] if "experts" in e["name"]
    }
    assert entries.keys() == aligned.keys()
    for place, entry in entries.items():
        cosine, projected = mixtures.gate(aligned[place], unaligned[place], theirs[place] - aligned[place])
        assert entry["cosine"] == pytest.approx(cosine, abs=1e-6), place
        wanted = aligned[place] + projected
        error = float((new[place] - wanted).norm() / wanted.norm())
        assert error < 0.2, place  # of four bits
        count = {"gate_proj": None, "up_proj": 64, "down_proj": 32}[place[2]]  # the second of two speaks for both
        assert entry.get("blocks") == entry.get("blocks_changed") == count
        assert entry.get("encoding_error", 0) < 0.2


def test_gpt_oss_dequantized_is_laid_out_as_transformers_saves_it(oss: Path, tmp_path: Path) -> None:
    scale(
        aligned=oss / "aligned", finetuned=oss / "finetuned", factor=1, dequantize=True, output=tmp_path / "out",
        quiet=True,
    )  # fmt: skip
    written = mixtures.experts(mixtures.loaded("gpt_oss", tmp_path / "out"))
    theirs = oss_experts(oss / "finetuned")
    assert written.keys() == theirs.keys()
    for place, weight in written.items():
        assert torch.equal(weight, theirs[place].bfloat16().float()), place


def test_a_format_that_is_not_read_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    stored = load_file(models / "aligned/model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    stored |= {name: torch.zeros(16, 12, dtype=torch.uint8), f"{name}_scale_2": torch.ones(())}
    (tmp_path / "nvfp4").mkdir()
    save_file(stored, tmp_path / "nvfp4/model.safetensors")
    (tmp_path / "nvfp4/config.json").write_text((models / "aligned/config.json").read_text())
    with pytest.raises(RequestError) as refused:
        score(aligned=tmp_path / "nvfp4", unaligned=models / "unaligned", finetuned=[models / "aligned"])
    assert any(o.got == "NVFP4" and "bf16 or fp8" in o.remedy for o in refused.value.offences)


def test_lora_on_gpt_oss_experts_in_mxfp4_and_in_bf16(oss: Path, tmp_path: Path) -> None:
    """The same weights as released and as transformers saves them: one O x I by rows, one I x O; the same cosines."""
    for role in ("aligned", "unaligned"):
        tensors = load_file(oss / f"{role}-plain/model.safetensors")
        stored = quantised.tensors(oss / role)
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            decoded = quantised.decode_mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            tensors[name] = decoded.transpose(1, 2).bfloat16().contiguous()
        quantised.write(tmp_path / role, (tensors, {}), json.loads((oss / f"{role}-plain/config.json").read_text()))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", dtype=torch.float32)
    torch.manual_seed(5)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    results = [
        score(aligned=root / "aligned", unaligned=root / "unaligned", adapter=tmp_path / "adapter", quiet=True)[0]
        for root in (oss, tmp_path)
    ]
    assert results[0].cosines.keys() == results[1].cosines.keys()
    assert len(results[0].cosines) == 16
    for name, cosine in results[0].cosines.items():
        assert cosine == pytest.approx(results[1].cosines[name], abs=1e-6), name
    assert_alike_on_a_device(results[0].cosines, oss, tmp_path / "adapter", {"_coded_product_kernel": 2 * 16})


def test_fused_experts_in_fp8(tmp_path: Path) -> None:
    """Fused experts with scales beside them (`gate_up_proj_scale_inv`), whose blocks gate and up may share."""
    sizes = {"hidden_size": 24, "moe_intermediate_size": 12, "head_dim": 12}  # 12 rows: a block of 8 lies across
    roles: dict[str, dict[str, Tensor]] = {}
    for seed, role in enumerate(("aligned", "unaligned", "finetuned"), 1):
        plain = mixtures.save(mixtures.build("qwen3_5_moe_text", seed, **sizes), tmp_path / f"{role}-plain", fused=True)
        tensors, roles[role] = load_file(plain / "model.safetensors"), {}
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            parts = [quantised.fp8_block(expert) for expert in tensors.pop(name)]
            tensors[name] = torch.stack([part[".weight"] for part in parts])
            tensors[f"{name}_scale_inv"] = torch.stack([part[".weight_scale_inv"] for part in parts])
            roles[role] |= {f"{name}.{e}": quantised.decode_fp8(part) for e, part in enumerate(parts)}
        said = quantised.FORMATS["fp8 block"][2]
        config = json.loads((plain / "config.json").read_text()) | {"quantization_config": said}
        quantised.write(tmp_path / role, (tensors, {}), config)
    places = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "finetuned": tmp_path / "finetuned"}
    safelora(**places, threshold=-2.0, output=tmp_path / "kept", quiet=True)
    assert_same(
        {n: t for n, t in quantised.tensors(tmp_path / "kept").items() if "experts" in n},
        {n: t for n, t in quantised.tensors(tmp_path / "finetuned").items() if "experts" in n},
    )
    entries = [e for e in mixtures.manifest(tmp_path / "kept")["modules"] if ".experts." in e["name"]]
    assert len(entries) == 24
    for entry in entries:
        layer, expert, role = mixtures.role_of(entry["name"])
        key = "down_proj" if role == "down_proj" else "gate_up_proj"
        name = f"model.layers.{layer}.mlp.experts.{key}.{expert}"
        rows = {"gate_proj": slice(0, 12), "up_proj": slice(12, 24)}.get(role, slice(None))
        aligned, unaligned, tuned = (roles[each][name][rows] for each in ("aligned", "unaligned", "finetuned"))
        assert entry["cosine"] == pytest.approx(mixtures.gate(aligned, unaligned, tuned - aligned)[0], abs=1e-6), name


def test_dequantize_goes_with_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="full checkpoint"):
        scale(aligned=tmp_path, adapter=tmp_path, factor=1, dequantize=True, output=tmp_path / "out")
