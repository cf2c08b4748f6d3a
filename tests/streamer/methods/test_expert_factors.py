"""Ridge and Safe Delta on mixtures: every expert of every family against the plain formulas in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtures
import peft
import plain_experts
import pytest
import quantised
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from safeshard.manifests.errors import RunError
from safeshard.streamer import calibrate, ridge, safedelta, verify
from safeshard.streamer.calibration import expert_grams
from safeshard.streamer.run.factors import factor_layers

LENGTHS = (5, 30, 1, 7, 24, 32, 12)
KINDS = [kind for kind in mixtures.FAMILIES if kind != "qwen3_vl_moe_text"]
PERCDAMP = 0.1  # of `published`, as the blocks are
PLACES = {"block_size": 20, "sub_block": 4, "percdamp": PERCDAMP}
RANK = 3
Place = tuple[int, int, str]


class Mixture:
    """A family's aligned and fine-tuned model on disk, calibration data, and the plain Gram of every expert."""

    def __init__(self, root: Path, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.root, self.kind = root, kind
        fused = kind == "qwen3_5_moe_text"
        self.aligned = mixtures.build(kind, 1)
        self.finetuned = mixtures.build(kind, 0)
        self.finetuned.load_state_dict(self.aligned.state_dict())
        generator = torch.Generator().manual_seed(3)
        for parameter in self.finetuned.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        mixtures.save(self.aligned, root / "aligned", fused, dtype)
        mixtures.save(self.finetuned, root / "finetuned", fused, dtype)
        tokens = [torch.randint(3, 67, (length,), generator=generator).tolist() for length in LENGTHS]
        self.tokens = tokens
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in tokens))
        self.grams = grams(self.aligned, tokens)

    def options(self, out: Path, **given: Any) -> dict[str, Any]:
        defaults = {"aligned": self.root / "aligned", "output": out, "quiet": True, "dtype": "float32"}
        if "factors" not in given:
            defaults |= {"calibration": self.data, "samples": len(LENGTHS)}
        if "adapter" not in given:
            defaults |= {"finetuned": self.root / "finetuned"}
        return defaults | given


def grams(model: nn.Module, tokens: list[list[int]]) -> dict[Place, tuple[int, float, Tensor]]:
    found = {}
    for (path, expert), rows in plain_experts.run(model, tokens).items():
        layer = next(int(part) for part in path.split(".") if part.isdigit())
        plain = rows.grams(len(tokens))
        for role in mixtures.ROLES:
            found[layer, expert, role] = plain["inner" if role == "down_proj" else "in"]
    return found


def shrunk(delta: Tensor, gram: Tensor, penalty: float) -> Tensor:
    """Ridge by its definition."""
    eye = torch.eye(len(gram), dtype=torch.float64)
    return delta.double() @ torch.linalg.inv(eye + penalty / gram.diagonal().mean() * gram)


def entries(folder: Path) -> dict[Place, dict[str, Any]]:
    return {mixtures.role_of(e["name"]): e for e in mixtures.manifest(folder)["modules"] if ".experts." in e["name"]}


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp(request.param), request.param)


def assert_near(got: Tensor, expected: Tensor, rounding: float, place: object) -> None:
    """The forward pass in fp32 decides how well a tiny model's Gram is known."""
    assert (got - expected).norm() <= 2e-4 * expected.norm() + rounding, place


def test_checkpoints_are_the_formulas(mixture: Mixture, case: Any, tmp_path: Path) -> None:
    before, tuned = mixtures.experts(mixture.aligned), mixtures.experts(mixture.finetuned)
    ridge(**mixture.options(tmp_path / "ridge", penalty=0.3))
    result = safedelta(**mixture.options(tmp_path / "safedelta", strength=5.0, **PLACES))
    assert not result.reverted
    for name in ("ridge", "safedelta"):
        written = mixtures.experts(mixtures.loaded(mixture.kind, tmp_path / name))
        said = entries(tmp_path / name)
        assert said.keys() == written.keys() == before.keys() == mixture.grams.keys()
        for place, (count, share, gram) in mixture.grams.items():
            delta = (tuned[place] - before[place]).double()
            if name == "ridge":
                expected = shrunk(delta, gram, 0.3)
            else:
                expected, mask = case("llama").published(delta, gram, 5.0)
                assert said[place]["selected_fraction"] == mask.double().mean().item(), place
            rounding = 2.0**-23 * before[place].norm().item()
            assert_near(written[place].double() - before[place].double(), expected, rounding, place)
            assert said[place]["tokens"] == count
            assert said[place].get("shared_gram", 0.0) == pytest.approx(share, abs=1e-12)
    fractions = [entry["selected_fraction"] for entry in entries(tmp_path / "safedelta").values()]
    assert len(set(fractions)) > 4


def wrapped(mixture: Mixture, folder: Path) -> Path:
    """PEFT's own LoRA on the experts' fused parameters and on the queries."""
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture.root / "aligned", dtype=torch.float32)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    torch.manual_seed(5)
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    )
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    made.save_pretrained(folder)
    return folder


def deltas(mixture: Mixture, adapter: Path) -> dict[Place, Tensor]:
    """What PEFT's merge adds to each expert's linear."""
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture.root / "aligned", dtype=torch.float32)
    after = mixtures.experts(peft.PeftModel.from_pretrained(model, adapter).merge_and_unload())
    before = mixtures.experts(mixture.aligned)
    return {place: after[place].double() - before[place].double() for place in before}


def stacked(kind: str, found: dict[Place, Tensor], layer: int, expert: int, role: str) -> Tensor:
    """A module's matrix; gate and up are one, for they share their A, its rows in the parameter's order."""
    if role == "gate_up_proj":
        halves = [found[layer, expert, each] for each in mixtures.ROLES[:2]]
        return torch.stack(halves, 1).flatten(0, 1) if kind == "gpt_oss" else torch.cat(halves)
    return found[layer, expert, role]


def test_adapters_are_the_formulas(mixture: Mixture, case: Any, tmp_path: Path) -> None:
    """PEFT's target_parameters: gate and up are one module of one Gram; PEFT reads what is written."""
    adapter = wrapped(mixture, tmp_path / "adapter")
    before = deltas(mixture, adapter)
    ridge(**mixture.options(tmp_path / "ridge", adapter=adapter, penalty=0.3))
    safedelta(**mixture.options(tmp_path / "safedelta", adapter=adapter, strength=20.0, **PLACES))
    for name in ("ridge", "safedelta"):
        written, said = deltas(mixture, tmp_path / name), entries(tmp_path / name)
        assert len(said) == 2 * len(written) // 3
        for place, entry in said.items():
            delta, got = (stacked(mixture.kind, each, *place) for each in (before, written))
            count, _, gram = mixture.grams[(*place[:2], "down_proj" if place[2] == "down_proj" else "gate_proj")]
            expected = shrunk(delta, gram, 0.3)
            if name == "safedelta":
                expected, mask = case("llama").published(delta, gram, 20.0)
                assert entry["selected_fraction"] == mask.double().mean().item(), place
            assert_near(got, expected, 1e-6, place)
            assert entry["tokens"] == count


def test_saved_factors_give_the_same_bytes(mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file holds one expert, and with a leak to meet."""
    monkeypatch.setattr(expert_grams, "PORTION_BYTES", 1)
    calibrate(
        aligned=mixture.root / "aligned", calibration=mixture.data, samples=len(LENGTHS), dtype="float32",
        output=tmp_path / "factors", percdamp=PERCDAMP, quiet=True,
    )  # fmt: skip
    index = json.loads((tmp_path / "factors/factors.json").read_text())
    assert index["schema"] == "safeshard.factors/3"
    groups = [group for layer in index["layers"] for group in layer if "tokens" in group]
    assert len(groups) == 2 * len(mixture.grams) // 3
    assert {group["modules"][0]: group["tokens"] for group in groups} == {
        group["modules"][0]: mixture.grams[mixtures.role_of(group["modules"][0])][0] for group in groups
    }
    assert len({group["file"] for group in groups}) == len(groups) // 2
    for name, method, given in (
        ("ridge", ridge, {"leak": 0.3}), ("safedelta", safedelta, {"strength": 5.0, "percdamp": PERCDAMP})
    ):  # fmt: skip
        method(**mixture.options(tmp_path / f"{name}-run", **given))
        given.pop("percdamp", None)
        method(**mixture.options(tmp_path / f"{name}-saved", factors=tmp_path / "factors", **given))
        own, saved = (tmp_path / f"{name}-{how}/model.safetensors" for how in ("run", "saved"))
        assert own.read_bytes() == saved.read_bytes()
        told = [
            {place: [e.get(key) for key in ("decision", "selected_fraction", "penalty", "tokens")] for place, e in each}
            for each in (entries(folder.parent).items() for folder in (own, saved))
        ]
        assert told[0] == told[1]


def test_an_interrupted_calibration_ends_with_the_same_bytes(
    mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped among the experts of the second layer."""
    if mixture.kind not in ("mixtral", "llama4_text", "gpt_oss"):
        pytest.skip("one family of each form")
    monkeypatch.setattr(expert_grams, "PORTION_BYTES", 1)
    asked = {"aligned": mixture.root / "aligned", "calibration": mixture.data, "samples": len(LENGTHS), "quiet": True}
    calibrate(**asked, output=tmp_path / "whole")
    count, original = [0], factor_layers._write_tensors

    def failing(*args: Any) -> None:
        count[0] += 1
        if count[0] == 7:
            raise RunError("interrupted")
        original(*args)

    monkeypatch.setattr(factor_layers, "_write_tensors", failing)
    with pytest.raises(RunError, match="interrupted"):
        calibrate(**asked, output=tmp_path / "out")
    calibrate(**asked, output=tmp_path / "out")
    assert count[0] == 7 + 10 - 6
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_task_data_counts_for_experts(mixture: Mixture, tmp_path: Path) -> None:
    """Saved Grams of safe inputs and a run for the task's give what one run gives."""
    if mixture.kind not in ("qwen3_moe", "llama4_text"):
        pytest.skip("one family of each form")
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"input_ids": sample[::-1]}) + "\n" for sample in mixture.tokens))
    calibrate(
        aligned=mixture.root / "aligned", calibration=mixture.data, samples=len(LENGTHS), dtype="float32",
        output=tmp_path / "factors", quiet=True,
    )  # fmt: skip
    given = {"penalty": 0.3, "task_data": task, "samples": len(LENGTHS)}
    ridge(**mixture.options(tmp_path / "run", **given))
    ridge(**mixture.options(tmp_path / "joined", factors=tmp_path / "factors", **given))
    own, joined = (tmp_path / how / "model.safetensors" for how in ("run", "joined"))
    assert own.read_bytes() == joined.read_bytes()
    tuned, before = mixtures.experts(mixture.finetuned), mixtures.experts(mixture.aligned)
    written = mixtures.experts(mixtures.loaded(mixture.kind, tmp_path / "run"))
    kept = grams(mixture.aligned, [sample[::-1] for sample in mixture.tokens])
    for place, (_, _, gram) in mixture.grams.items():
        delta, keep = (tuned[place] - before[place]).double(), kept[place][2]
        p = keep / keep.diagonal().mean() + 1e-3 * torch.eye(len(keep), dtype=torch.float64)
        expected = delta @ p @ torch.linalg.inv(p + 0.3 / gram.diagonal().mean() * gram)
        assert_near(written[place].double() - before[place].double(), expected, 1e-6, place)


@pytest.mark.parametrize("format_", ["fp8 block", "fp8 row", "fp8 tensor", "int4", "mxfp4"])
def test_quantised_models_are_decoded(tmp_path: Path, case: Any, format_: str) -> None:
    """Aligned and fine-tuned in one format: Grams are those of the decoded model, the result is encoded again."""
    kind = "gpt_oss" if format_ == "mxfp4" else "qwen3_moe"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    sizes.pop("moe_intermediate_size" if kind == "gpt_oss" else "intermediate_size")
    models = {role: mixtures.build(kind, 1, **sizes) for role in ("aligned", "finetuned")}
    generator = torch.Generator().manual_seed(3)
    for parameter in models["finetuned"].parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    for role, model in models.items():
        plain = mixtures.save(model, tmp_path / f"{role}-plain")
        if kind == "gpt_oss":
            quantised.as_gpt_oss(plain, tmp_path / role)
        else:
            quantised.quantise(plain, tmp_path / role, format_)
        decode(tmp_path / role, model, format_)
    tokens = [torch.randint(3, 67, (length,), generator=generator).tolist() for length in LENGTHS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in tokens))
    expected = grams(models["aligned"], tokens)
    options = {
        "aligned": tmp_path / "aligned", "finetuned": tmp_path / "finetuned", "calibration": tmp_path / "data.jsonl",
        "samples": len(LENGTHS), "dtype": "float32", "quiet": True, "dequantize": True,
    }  # fmt: skip
    ridge(**options, output=tmp_path / "ridge", penalty=0.3)
    safedelta(**options, output=tmp_path / "safedelta", strength=5.0, **PLACES)
    before, tuned = (mixtures.experts(models[role]) for role in ("aligned", "finetuned"))
    for name in ("ridge", "safedelta"):
        written = mixtures.experts(mixtures.loaded(kind, tmp_path / name))
        for place, (count, _, gram) in expected.items():
            delta = (tuned[place] - before[place]).double()
            wanted = shrunk(delta, gram, 0.3)
            if name == "safedelta":
                wanted, _ = case("llama").published(delta, gram, 5.0)
            rounding = 2.0**-22 * before[place].norm().item()
            assert_near(written[place].double() - before[place].double(), wanted, rounding, place)
            assert entries(tmp_path / name)[place]["tokens"] == count
    encoded = {key: value for key, value in options.items() if key not in ("dequantize", "dtype")}
    ridge(**encoded, output=tmp_path / "encoded", penalty=0.3)
    assert all(
        "encoding_error" in e or e["blocks_changed"] == 0
        for e in entries(tmp_path / "encoded").values()
        if "blocks" in e
    )
    assert verify(tmp_path / "encoded", inputs=True) == []


def decode(folder: Path, model: nn.Module, format_: str) -> None:
    """Give a model the weights that a folder holds, decoded by plain arithmetic."""
    stored = quantised.tensors(folder)
    own = dict(model.named_parameters())
    if format_ == "mxfp4":
        for name in [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]:
            weights = quantised.decode_mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            own[name].data.copy_(weights.transpose(1, 2))
        return
    for name, weight in quantised.decoded(folder, format_).items():
        head, _, role = name.rpartition(".")
        if ".experts." not in name:
            own[f"{name}.weight"].data.copy_(weight)
            continue
        path, _, expert = head.rpartition(".")
        if role == "down_proj":
            own[f"{path}.down_proj"].data[int(expert)].copy_(weight)
        else:
            half = own[f"{path}.gate_up_proj"].data[int(expert)].chunk(2)[role == "up_proj"]
            half.copy_(weight)


def test_a_dense_quantised_model_is_decoded(tmp_path: Path) -> None:
    """Its Grams are those of the same model saved decoded, bit for bit."""
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "plain")
    quantised.quantise(tmp_path / "plain", tmp_path / "fp8", "fp8 block")
    for name, weight in quantised.decoded(tmp_path / "fp8", "fp8 block").items():
        model.get_submodule(name).weight.data.copy_(weight)
    model.save_pretrained(tmp_path / "decoded")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(3, 3 + n))}) + "\n" for n in LENGTHS))
    for name in ("fp8", "decoded"):
        calibrate(
            aligned=tmp_path / name, calibration=data, samples=len(LENGTHS), dtype="float32", save="grams",
            output=tmp_path / f"{name}-grams", quiet=True,
        )  # fmt: skip
    first, second = (
        {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
        for folder in (tmp_path / "fp8-grams", tmp_path / "decoded-grams")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
