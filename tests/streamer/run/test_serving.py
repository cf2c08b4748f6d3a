"""`--serve vllm`: what vLLM reads of the written config gives the deltas of an ordinary output.

vLLM's rules, as of its lora/peft_helper.py and config/lora.py: it takes r, lora_alpha, target_modules, bias,
modules_to_save, use_rslora and use_dora from the config and passes over all else; the scaling is alpha / r, with rsLoRA
alpha / sqrt(r), for every module; modules_to_save, DoRA and biases are refused, and a rank above --max-lora-rank, which
is one of a list.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.manifests.schema import load
from safeshard.streamer import safelora, safemerge, scale, verify
from safeshard.streamer.cli.app import main

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def as_vllm_reads(folder: Path) -> dict[str, Tensor]:
    """Module -> delta (fp64)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert config.get("bias", "none") == "none"
    assert config["target_modules"]
    assert config["r"] in MAX_LORA_RANKS
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors, deltas = load_file(folder / "adapter_model.safetensors"), {}
    for name, a in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        assert match, f"vLLM knows no such tensor: {name}"
        if match[2] == "A":
            b = tensors[name.replace("lora_A", "lora_B")]
            assert len(a) == b.shape[1] <= config["r"]
            deltas[match[1]] = scaling * b.double() @ a.double()
    return deltas


def as_peft_reads(folder: Path) -> dict[str, Tensor]:
    """Module -> delta (fp64), patterns included."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, deltas = load_file(folder / "adapter_model.safetensors"), {}

    def pattern(key: str, module: str, default: float) -> float:
        found = [v for k, v in (config.get(key) or {}).items() if re.fullmatch(rf"(.*\.)?{k}", module)]
        return float(found[0]) if found else default

    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha, rank = (
                pattern(k, module, config[d]) for k, d in (("alpha_pattern", "lora_alpha"), ("rank_pattern", "r"))
            )
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            deltas[module] = scaling * tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
    return deltas


@pytest.fixture
def inputs(world: Any) -> dict[str, Path]:
    """Adapters with ranks and scalings of their own for some modules, and rsLoRA."""
    paths: dict[str, Path] = world.trio()
    base = world.llama(seed=1)
    generator = torch.Generator().manual_seed(5)
    for number, role in enumerate(("adapter", "safe_adapter")):
        tensors = {}
        for name, weight in base.items():
            if "_proj." in name:
                rank, key = 6 if "v_proj" in name else 4, f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
                tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
        paths[role] = world.adapter(
            f"uneven{number}", {}, tensors=tensors, rank_pattern={"v_proj": 6}, alpha_pattern={"o_proj": 3},
            use_rslora=True,
        )  # fmt: skip
    return paths


def run(method: str, inputs: dict[str, Path], out: Path, **options: Any) -> Any:
    roles = {
        "safemerge": list(inputs),
        "safelora": ["aligned", "unaligned", "adapter"],
        "scale": ["aligned", "adapter"],
    }
    function = {"safemerge": safemerge, "safelora": safelora, "scale": scale}[method]
    return function(**{r: inputs[r] for r in roles[method]}, **options, output=out, quiet=True)


@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [
        ("scale", {"factor": 0.5}, 8),
        ("safelora", {"num_layers": 6}, 8),
        ("safemerge", {"threshold": 0.7}, 8),
        ("safemerge", {"threshold": 0.7, "combine": "exact"}, 16),
    ],
)
def test_deltas_are_those_of_an_ordinary_output(
    world: Any, inputs: dict[str, Path], method: str, options: dict[str, Any], rank: int
) -> None:
    run(method, inputs, world.root / "plain", **options)
    result = run(method, inputs, world.root / "served", **options, serve="vllm")
    plain, served = as_peft_reads(world.root / "plain"), as_vllm_reads(world.root / "served")
    assert plain.keys() == served.keys()
    for name, delta in plain.items():
        torch.testing.assert_close(served[name], delta, rtol=1e-5, atol=1e-5)
    manifest = load(world.root / "served")
    assert {m.rank for m in manifest.modules} == {rank} == {result.plan.rank}
    assert manifest.method.options["serve"] == "vllm"
    assert "serve" not in load(world.root / "plain").method.options
    ours, theirs = load(world.root / "plain").effect, manifest.effect
    assert ours is not None
    assert theirs is not None
    assert theirs.kept_norm == pytest.approx(ours.kept_norm, rel=1e-5)
    assert verify(world.root / "served", recompute=3) == []


def test_truncation_is_the_best_and_its_loss_is_recorded(world: Any, inputs: dict[str, Path]) -> None:
    run("scale", inputs, world.root / "plain", factor=0.5)
    run("scale", inputs, world.root / "served", factor=0.5, serve="vllm", rank=3)
    served = as_vllm_reads(world.root / "served")
    entries = {m.name: m for m in load(world.root / "served").modules}
    for name, delta in as_peft_reads(world.root / "plain").items():
        s = torch.linalg.svdvals(delta)
        lost = float((s[3:].square().sum() / s.square().sum()).sqrt())
        assert float((served[name] - delta).norm() / delta.norm()) == pytest.approx(lost, rel=1e-4)
        assert entries[name].lost_fraction == pytest.approx(lost, rel=1e-4)
        assert entries[name].rank == 8


def test_what_vllm_cannot_read_is_refused(world: Any, inputs: dict[str, Path]) -> None:
    out = world.root / "out"
    wide = world.adapter("wide", world.llama(seed=1), rank=520)
    with pytest.raises(RequestError, match=r"a rank of at most 512, got 520 \(add --rank 512"):
        run("scale", inputs | {"adapter": wide}, out, factor=0.5, serve="vllm")
    tensors = world.pairs(world.llama(seed=1), 4, 2) | {"base_model.model.lm_head.weight": torch.randn(32, 24)}
    saved = world.adapter("saved", {}, tensors=tensors, modules_to_save=["lm_head"])
    with pytest.raises(RequestError, match="saved whole"):
        run("scale", inputs | {"adapter": saved}, out, factor=0.5, serve="vllm")
    with pytest.raises(RequestError, match="an adapter as output"):
        scale(aligned=inputs["aligned"], finetuned=inputs["unaligned"], factor=0.5, serve="vllm", output=out)
    with pytest.raises(RequestError, match="--rank goes with --serve"):
        run("scale", inputs, out, factor=0.5, rank=3)


def test_the_rank_is_shown(capsys: pytest.CaptureFixture[str], world: Any, inputs: dict[str, Path]) -> None:
    argv = ["scale", "--aligned", inputs["aligned"], "--adapter", inputs["adapter"], "--factor", "0.5", "--output"]
    for extra, line in (([], "  rank 6\n"), (["--serve", "vllm"], "  rank 8: serve it with --max-lora-rank 8\n")):
        for dry in ([], ["--dry-run"]):
            with pytest.raises(SystemExit):
                main([*map(str, argv), str(world.root / f"out{len(extra)}"), *extra, *dry, "--overwrite"])
            assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("scale", {"factor": 0.5}),
        ("safelora", {"num_layers": 6}),
        ("safemerge", {"threshold": 0.7, "combine": "exact"}),
    ],
)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_every_method_merges_an_adapter_into_a_checkpoint(
    world: Any, inputs: dict[str, Path], method: str, options: dict[str, Any], dtype: str | None
) -> None:
    run(method, inputs, world.root / "plain", **options)
    run(method, inputs, world.root / "merged", **options, output_format="checkpoint", dtype=dtype)
    aligned = load_file(inputs["aligned"] / "model.safetensors")
    written = load_file(world.root / "merged/model.safetensors")
    assert written.keys() == aligned.keys()
    deltas = as_peft_reads(world.root / "plain")
    for name, weight in aligned.items():
        expected = weight.double() + deltas.get(name.removesuffix(".weight"), 0)
        assert written[name].dtype == (torch.float32 if dtype else weight.dtype)
        rtol = 1e-5 if dtype else 2**-8
        torch.testing.assert_close(written[name].double(), expected, rtol=rtol, atol=1e-5)
    manifest = load(world.root / "merged")
    ours = load(world.root / "plain").effect
    assert ours is not None
    assert manifest.effect is not None
    assert manifest.effect.kept_norm == pytest.approx(ours.kept_norm, rel=1e-2)
    assert verify(world.root / "merged", recompute=3) == []
