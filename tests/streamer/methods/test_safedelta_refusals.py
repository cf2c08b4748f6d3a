"""What Safe Delta refuses, what it cannot treat, and how it says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeshard.kernels.calibrated.factor import NotPositiveDefiniteError
from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import safedelta
from safeshard.streamer.calibration import groups
from safeshard.streamer.cli.app import main

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
INNER = 48  # the width of down_proj's input alone


@pytest.fixture
def no_factor(monkeypatch: pytest.MonkeyPatch) -> str:
    """Grams of the MLP's width have no factor."""
    original = groups.safety_factor

    def refuse(gram: Tensor, percdamp: float) -> Any:
        if len(gram) == INNER:
            raise NotPositiveDefiniteError("not positive definite with damping 0.01, 0.1, 1")
        return original(gram, percdamp)

    monkeypatch.setattr(groups, "safety_factor", refuse)
    return "down_proj"


def run_cli(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return (stop.value.code if isinstance(stop.value.code, int) else 0), out, err


@pytest.mark.parametrize("whole", [True, False])
def test_what_has_no_factor_stays_aligned(
    llama: Any, no_factor: str, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    inputs: dict[str, Any] = {"finetuned": llama.root / "finetuned"} if whole else {"adapter": llama.adapter}
    status, out, err = run_cli(capsys, *llama.command("out", rest="finetuned", **inputs), "--json")
    assert status == 1
    reverted = [module for module in llama.grams if no_factor in module]
    assert all(module in err for module in reverted)
    assert "not positive definite" in err
    [outcome] = json.loads(out.splitlines()[-1])
    assert outcome["decisions"] == {"selected": len(llama.grams) - len(reverted), "reverted": len(reverted)}
    manifest = json.loads((llama.root / "out/manifest.json").read_text())
    assert {f["subject"] for f in manifest["fallbacks"]} == set(reverted)
    got = llama.tensors("out")
    deltas = {} if whole else llama.deltas(llama.root / "out", got)
    for module in llama.grams:
        if whole:
            unchanged = torch.equal(got[f"{module}.weight"], llama.aligned[f"{module}.weight"])
        else:
            unchanged = not deltas[module].any()
        assert unchanged == (module in reverted)
    assert run_cli(capsys, "verify", llama.root / "out")[0] == 0


def test_degenerate_data_still_has_factors(llama: Any) -> None:
    """One token, over and over: Grams of rank one or a few, which damping mends."""
    data = llama.root / "one.jsonl"
    data.write_text('{"input_ids": [5]}\n' * 3)
    result, got = llama.run("out", calibration=data, samples=3)
    assert not result.reverted
    assert all(t.isfinite().all() for t in got.values())


def test_non_finite_gram_names_module_and_sample(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    aligned = dict(llama.aligned)
    token = llama.tokens[6][0]
    aligned["model.embed_tokens.weight"] = aligned["model.embed_tokens.weight"].clone()
    aligned["model.embed_tokens.weight"][token] = torch.nan
    (llama.root / "aligned").unlink()
    llama.write("aligned", aligned)
    status, _, err = run_cli(capsys, *llama.command("out"))
    assert status == 1
    assert "model.layers.0.self_attn.q_proj" in err
    first = next(
        i for i in sorted(range(len(llama.lengths)), key=llama.lengths.__getitem__) if token in llama.tokens[i]
    )
    assert f"calibration sample {first}" in err


def test_refusals_of_data(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(**options: Any) -> str:
        status, _, err = run_cli(capsys, *llama.command("out", **options))
        assert status == 2
        assert not (llama.root / "out.partial").exists()
        return err

    assert f"{len(llama.lengths)}" in refused(samples=100)
    assert "100 samples" in refused(samples=100)
    text = llama.root / "text.jsonl"
    text.write_text('{"instruction": "a", "output": "b"}\n')
    err = refused(calibration=text, samples=1)
    assert "tokenizer" in err
    assert str(llama.root / "aligned") in err
    assert "safeshard-" not in err
    long = llama.root / "long.jsonl"
    long.write_text(json.dumps({"input_ids": [1] * 80}))
    err = refused(calibration=long, samples=1)
    assert "max_position_embeddings" in err
    assert "--max-tokens" in err
    outside = llama.root / "outside.jsonl"
    outside.write_text(json.dumps({"input_ids": [97]}))
    assert "outside.jsonl:1" in refused(calibration=outside, samples=1)


def test_rows_that_the_fine_tuned_model_adds_go_along(llama: Any) -> None:
    tensors, names = dict(llama.finetuned), ("model.embed_tokens.weight", "lm_head.weight")
    for name in names:
        tensors[name] = torch.cat([tensors[name], torch.ones(31, 32)])
    llama.write("padded", tensors)
    llama.run("added", finetuned=llama.root / "padded")
    got = load_file(llama.root / "added/model.safetensors")
    for name in names:
        assert torch.equal(got[name], torch.cat([llama.aligned[name], torch.ones(31, 32)]))


def test_a_configuration_with_another_vocabulary_than_the_weights_is_named(llama: Any) -> None:
    config = json.loads(llama.config)
    (llama.root / "aligned").unlink()
    llama.write("aligned", llama.aligned)
    (llama.root / "aligned/config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    with pytest.raises(RequestError, match="belong together"):
        llama.run("out", finetuned=llama.root / "finetuned")


def test_experts_fused_in_an_unknown_way_are_refused(tmp_path: Path, llama: Any) -> None:
    config = transformers.AutoConfig.for_model(
        "granitemoe_swa", **SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1}
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    tensors = load_file(tmp_path / "moe/model.safetensors")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/config.json").write_text((tmp_path / "moe/config.json").read_text())
    save_file({n: t + 0.01 for n, t in tensors.items()}, tmp_path / "tuned/model.safetensors")
    with pytest.raises(RequestError, match="experts fused to") as refused:
        llama.run("out", aligned=tmp_path / "moe", finetuned=tmp_path / "tuned")
    assert "granitemoe_swa" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "output_format": "checkpoint"}, "rank goes with an adapter output"),
        ({"finetuned": "x", "adapter": None, "rank": 4}, "go with --adapter"),
        ({"finetuned": "x", "adapter": None, "output_format": "adapter"}, "go with --adapter"),
        ({"strength": -1.0}, "strength"),
        ({"sub_block": 0}, "sub-block"),
        ({"factors": "x", "calibration": "y"}, "calibration"),
        ({"factors": "x", "samples": 3}, "samples"),
        ({"leak": 0.1, "strength": 1.0}, "either --leak or --strength"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        safedelta(**{"aligned": "a", "adapter": "b", "output": tmp_path / "out"} | options)


@pytest.mark.parametrize("whole", [True, False])
def test_a_value_that_is_not_finite_is_named(llama: Any, whole: bool) -> None:
    """Also where it would not have been selected."""
    folder = llama.root / "broken"
    if whole:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors = {n: t.clone() for n, t in llama.finetuned.items()}
        llama.write("broken", tensors)
    else:
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        shutil.copytree(llama.adapter, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name][1, 2] = torch.nan
    save_file(tensors, folder / ("model.safetensors" if whole else "adapter_model.safetensors"))
    with pytest.raises(RunError, match=rf"{name} holds NaN"):
        llama.run("out", strength=0.1, **{"finetuned" if whole else "adapter": folder})
