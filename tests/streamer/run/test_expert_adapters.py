"""LoRA on experts: PEFT's own adapters, both packings, every expert against the plain formula and PEFT's merge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mixtures
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeshard.manifests.errors import RequestError
from safeshard.streamer import safelora, safemerge, scale, score
from safeshard.streamer.cli.app import main

RANK, COUNT = 3, 4
FAMILIES = [kind for kind in mixtures.FAMILIES if kind != "qwen3_vl_moe_text"]  # which is no causal model of its own
PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's aligned and unaligned model on disk."""
    root = tmp_path_factory.mktemp(request.param)
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build(request.param, seed), root / role, fused=request.param == "qwen3_5_moe_text")
    return request.param, root


def wrapped(folder: Path, seed: int, **config: Any) -> Any:
    """The model with a LoRA of random A and B."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": [], "target_parameters": list(PARAMETERS)} | config
    torch.manual_seed(seed)
    made = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return made


def merged(folder: Path, adapter: Path) -> nn.Module:
    """The model that PEFT makes of an adapter; every tensor of it must be used."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = peft.PeftModel.from_pretrained(model, adapter)
    held = {name.replace(".default", "") for name in made.state_dict() if "lora_" in name}
    assert held == {name for name in load_file(adapter / "adapter_model.safetensors") if "lora_" in name}
    whole: nn.Module = made.merge_and_unload()
    return whole


def deltas(folder: Path, adapter: Path) -> dict[tuple[int, int, str], Tensor]:
    """What PEFT's merge adds to each expert's linear, gate above up."""
    before = mixtures.experts(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    after = mixtures.experts(merged(folder, adapter))
    return {place: after[place].double() - before[place].double() for place in before}


def stacked(found: dict[tuple[int, int, str], Tensor], layer: int, expert: int, role: str) -> Tensor:
    """A module's matrix by its role; gate_up_proj is gate above up."""
    if role == "gate_up_proj":
        return torch.cat([found[layer, expert, each] for each in mixtures.ROLES[:2]])
    return found[layer, expert, role]


def reference(root: Path, adapter: Path, threshold: float) -> dict[tuple[int, int, str], tuple[float, Tensor]]:
    """Of every module its cosine and its delta after SafeLoRA, from PEFT's merge and the formula with P formed."""
    found = deltas(root / "aligned", adapter)
    weights = [mixtures.experts(mixtures.loaded("", root / role)) for role in ("aligned", "unaligned")]
    result = {}
    for layer, expert in sorted({place[:2] for place in found}):
        for role in ("gate_up_proj", "down_proj"):
            delta = stacked(found, layer, expert, role)
            cosine, projected = mixtures.gate(*(stacked(w, layer, expert, role) for w in weights), delta)
            result[layer, expert, role] = (cosine, projected if cosine <= threshold else delta)
    return result


def entries(folder: Path) -> dict[tuple[int, int, str], dict[str, Any]]:
    return {mixtures.role_of(e["name"]): e for e in mixtures.manifest(folder)["modules"] if ".experts." in e["name"]}


def test_safelora_on_fused_parameters_is_peft_and_the_formula(base: tuple[str, Path], tmp_path: Path) -> None:
    _, root = base
    wrapped(root / "aligned", 5, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    places = {"aligned": root / "aligned", "unaligned": root / "unaligned", "adapter": tmp_path / "adapter"}
    (scored,) = score(**places, quiet=True)
    cosines = sorted(c for name, c in scored.cosines.items() if ".experts." in name and c is not None)
    threshold = (cosines[len(cosines) // 2] + cosines[len(cosines) // 2 - 1]) / 2
    result = safelora(**places, threshold=threshold, output=tmp_path / "out", quiet=True)
    expected = reference(root, tmp_path / "adapter", threshold)
    written, manifest = deltas(root / "aligned", tmp_path / "out"), entries(tmp_path / "out")
    assert manifest.keys() == expected.keys()
    assert {kind: n for kind, n in result.plan.kinds.items() if "experts" in kind} == {
        "experts.*.gate_up_proj": (len(expected) // 2,) * 2, "experts.*.down_proj": (len(expected) // 2,) * 2,
    }  # fmt: skip
    for place, (cosine, delta) in expected.items():
        assert manifest[place]["cosine"] == pytest.approx(cosine, abs=1e-5), place
        torch.testing.assert_close(stacked(written, *place), delta, rtol=0, atol=2e-6)
    assert {entry["decision"] for entry in manifest.values()} == {"kept", "projected"}


@pytest.mark.parametrize("combine", ["linear", "exact", "svd"])
def test_safemerge_on_fused_parameters_is_peft_and_the_formula(
    base: tuple[str, Path], tmp_path: Path, combine: str
) -> None:
    kind, root = base
    if combine != "exact" and kind not in ("qwen3_moe", "gpt_oss", "llama4_text"):
        pytest.skip("one family of each orientation")
    for seed, name in ((5, "adapter"), (6, "safe")):
        wrapped(root / "aligned", seed).save_pretrained(tmp_path / name)
    extra = {"rank": 2 * RANK} if combine == "svd" else {}
    safemerge(
        aligned=root / "aligned", unaligned=root / "unaligned", adapter=tmp_path / "adapter",
        safe_adapter=tmp_path / "safe", threshold=2.0, combine=combine, output=tmp_path / "out", quiet=True, **extra,
    )  # fmt: skip
    tuned, safe, new = (deltas(root / "aligned", tmp_path / name) for name in ("adapter", "safe", "out"))
    if combine == "linear":  # A and B are combined, not their products: PEFT's own merge is the judge
        made = wrapped(root / "aligned", 5)
        theirs = merge_by_peft(made, tmp_path)
        for place, delta in new.items():
            torch.testing.assert_close(delta, theirs[place], rtol=0, atol=2e-6)
        return
    for place, delta in new.items():
        torch.testing.assert_close(delta, 0.8 * tuned[place] + 0.2 * safe[place], rtol=0, atol=2e-6)


def merge_by_peft(made: Any, root: Path) -> dict[tuple[int, int, str], Tensor]:
    """PEFT's linear combination of the two adapters, tensor by tensor: sqrt(w s) on A and on B."""
    first, second = (load_file(root / name / "adapter_model.safetensors") for name in ("adapter", "safe"))
    roots = [(0.8 * 2) ** 0.5, (0.2 * 2) ** 0.5]
    combined = {name: roots[0] * first[name] + roots[1] * second[name] for name in first}
    folder = root / "combined"
    folder.mkdir()
    save_file(combined, folder / "adapter_model.safetensors")
    config = json.loads((root / "adapter/adapter_config.json").read_text()) | {"r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas(
        Path(json.loads((root / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]), folder
    )


def test_scaling_keeps_the_other_tensor_byte_for_byte(base: tuple[str, Path], tmp_path: Path) -> None:
    _, root = base
    wrapped(root / "aligned", 5).save_pretrained(tmp_path / "adapter")
    scale(aligned=root / "aligned", adapter=tmp_path / "adapter", factor=0.5, output=tmp_path / "out", quiet=True)
    before, after = (deltas(root / "aligned", tmp_path / name) for name in ("adapter", "out"))
    assert len(before) == len(after) >= 12
    for place, delta in after.items():
        torch.testing.assert_close(delta, 0.5 * before[place], rtol=0, atol=1e-7)


EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate"]


@pytest.mark.parametrize("targets", ["all-linear", EVERYTHING], ids=["all-linear", "named"])
@pytest.mark.parametrize("kind", ["glm4_moe", "mixtral"])
def test_modules_that_transformers_fused_are_what_peft_makes_of_them(
    tmp_path: Path, kind: str, targets: str | list[str]
) -> None:
    """PEFT turns names of experts' modules, and of routers, into bare names among target_parameters; ranks double."""
    if kind == "mixtral" and isinstance(targets, list):
        targets = [{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(name, name) for name in targets]
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build(kind, seed), tmp_path / role)
    for seed, name in ((5, "adapter"), (6, "safe")):
        wrapped(tmp_path / "aligned", seed, target_modules=targets, target_parameters=None).save_pretrained(
            tmp_path / name
        )
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert {"gate_up_proj", "down_proj", "gate.weight"} <= set(raw["target_parameters"])
    places = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "adapter": tmp_path / "adapter"}
    common = {"safe_adapter": tmp_path / "safe", "threshold": 2.0, "combine": "exact", "quiet": True}
    result = safemerge(**places, **common, output=tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", dtype=torch.float32).state_dict()
    tuned, safe, new = (merged(tmp_path / "aligned", tmp_path / n).state_dict() for n in ("adapter", "safe", "out"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, tuned[name])}
    assert {name.rpartition("mlp.")[2] for name in changed if "mlp" in name} == {
        "gate.weight", "experts.gate_up_proj", "experts.down_proj"
    }  # fmt: skip
    for name, tensor in before.items():
        expected = tensor + 0.8 * (tuned[name] - tensor) + 0.2 * (safe[name] - tensor)
        torch.testing.assert_close(new[name], expected, rtol=0, atol=2e-6)
    assert result.plan.expected == len(mixtures.manifest(tmp_path / "out")["modules"])


def test_a_target_that_no_weight_bears_is_passed_over(tmp_path: Path) -> None:
    """PEFT targets `gate.weight` whatever a family calls its routers (Hunyuan); where there is one it is due."""
    mixtures.save(mixtures.build("qwen3_moe", 1), tmp_path / "aligned")
    wrapped(tmp_path / "aligned", 5, target_parameters=["experts.down_proj", "gate.weight"]).save_pretrained(
        tmp_path / "adapter"
    )
    config, file = (tmp_path / "adapter" / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"target_parameters": [*raw["target_parameters"], "gate.wg.weight"]}))
    common = {"aligned": tmp_path / "aligned", "adapter": tmp_path / "adapter", "factor": 0.5, "quiet": True}
    scale(**common, output=tmp_path / "out")
    save_file({name: t for name, t in load_file(file).items() if ".gate." not in name}, file)
    with pytest.raises(RequestError) as refused:
        scale(**common, output=tmp_path / "lost")
    (offence,) = refused.value.offences
    assert offence.got == "none for 'gate.weight'"


def test_merged_into_a_checkpoint_it_is_what_peft_merges(base: tuple[str, Path], tmp_path: Path) -> None:
    """An expert's gate and up are one pair, and two weights where they are stored apart."""
    kind, root = base
    wrapped(root / "aligned", 5, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    common = {"aligned": root / "aligned", "adapter": tmp_path / "adapter", "quiet": True}
    scale(**common, factor=0.5, output_format="checkpoint", output=tmp_path / "out")
    before, new = (mixtures.experts(mixtures.loaded(kind, folder)) for folder in (root / "aligned", tmp_path / "out"))
    for place, delta in deltas(root / "aligned", tmp_path / "adapter").items():
        torch.testing.assert_close(new[place].double() - before[place].double(), 0.5 * delta, rtol=0, atol=2e-6)


def repack(adapter: Path, folder: Path, **config: Any) -> Path:
    """The same adapter in Unsloth's packing: B's columns expert by expert."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor.view(-1, RANK, COUNT).transpose(1, 2).reshape(tensor.shape).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = json.loads((adapter / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("config", "packing"),
    [({"lora_B_layout": "grouped_by_expert"}, None), ({"auto_mapping": {"unsloth_fixed": True}}, "unsloth")],
)
def test_unsloth_packing_means_the_same(tmp_path: Path, config: dict[str, Any], packing: str | None) -> None:
    """unsloth#6930: the same shapes, another meaning; read as such, decisions and numbers are those of PEFT's."""
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build("qwen3_moe", seed), tmp_path / role)
    wrapped(tmp_path / "aligned", 5).save_pretrained(tmp_path / "peft")
    repack(tmp_path / "peft", tmp_path / "unsloth", **config)
    common = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "threshold": 0.9, "quiet": True}
    safelora(**common, adapter=tmp_path / "peft", output=tmp_path / "out-peft")
    safelora(**common, adapter=tmp_path / "unsloth", output=tmp_path / "out-unsloth", expert_packing=packing)
    assert entries(tmp_path / "out-peft") == entries(tmp_path / "out-unsloth")
    repack(tmp_path / "out-peft", tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out-unsloth", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_packing_is_demanded_where_nothing_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtures.save(mixtures.build("qwen3_moe", 1), tmp_path / "aligned")
    wrapped(tmp_path / "aligned", 5).save_pretrained(tmp_path / "peft")
    repack(tmp_path / "peft", tmp_path / "unsloth", auto_mapping={"unsloth_fixed": True})
    words = ["scale", "--aligned", tmp_path / "aligned", "--adapter", tmp_path / "unsloth", "--factor", "0.5"]
    words += ["--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    assert "--expert-packing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in [*words, "--expert-packing", "unsloth"]])
    assert stop.value.code == 0
    assert "experts.*.gate_up_proj 8 of 8" in capsys.readouterr().out
    assert mixtures.manifest(tmp_path / "out")["method"]["options"]["expert_packing"] == "unsloth"


def old_peft(adapter: Path, folder: Path) -> Path:
    """The adapter as PEFT before 0.19 would hold the same deltas: A acts on outputs, B on inputs (unsloth-zoo#647)."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    swapped = {}
    for name in (n for n in tensors if "lora_A" in n):
        other = name.replace("lora_A", "lora_B")
        a = tensors[name].view(COUNT, RANK, -1)
        b = tensors[other].view(-1, RANK, COUNT).permute(2, 1, 0)  # experts x rank x out
        swapped[name] = b.reshape(COUNT * RANK, -1).contiguous()
        swapped[other] = a.permute(2, 1, 0).reshape(-1, RANK * COUNT).contiguous()
    save_file(swapped, folder / "adapter_model.safetensors")
    raw = json.loads((adapter / "adapter_config.json").read_text()) | {"peft_version": "0.18.1"}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("square", [False, True])
def test_adapters_of_older_peft_are_read_the_other_way_round(tmp_path: Path, square: bool) -> None:
    """Of a square weight only PEFT's version tells."""
    sizes = {"moe_intermediate_size": 12} if square else {}
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build("qwen3_moe", seed, **sizes), tmp_path / role)
    wrapped(tmp_path / "aligned", 5).save_pretrained(tmp_path / "new")
    old_peft(tmp_path / "new", tmp_path / "old")
    common = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "threshold": 0.9, "quiet": True}
    for name in ("new", "old"):
        safelora(**common, adapter=tmp_path / name, output=tmp_path / f"out-{name}")
    new, old = entries(tmp_path / "out-new"), entries(tmp_path / "out-old")
    assert new.keys() == old.keys()
    for place, entry in new.items():
        assert old[place]["cosine"] == pytest.approx(entry["cosine"], abs=1e-6)
    again = old_peft(tmp_path / "out-new", tmp_path / "again")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out-old", again))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def per_expert(adapter: Path, folder: Path) -> Path:
    """An adapter with a pair an expert's linear, as PEFT writes it for unfused models: gate and up share their A."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    apart = {}
    for name in (n for n in tensors if "lora_A" in n):
        a = tensors[name].view(COUNT, RANK, -1)
        b = tensors[name.replace("lora_A", "lora_B")].view(-1, RANK, COUNT)
        inner = ".base_layer." in name
        head = re.sub(r"(\.base_layer)?\.lora_A\.weight", "", name)
        for expert in range(COUNT):
            halves = b[:, :, expert].chunk(2) if inner else [b[:, :, expert]]
            for role, half in zip(mixtures.ROLES[:2] if inner else mixtures.ROLES[2:], halves, strict=True):
                apart[f"{head}.{expert}.{role}.lora_A.weight"] = a[expert].clone()
                apart[f"{head}.{expert}.{role}.lora_B.weight"] = half.contiguous()
    save_file(apart, folder / "adapter_model.safetensors")
    raw = json.loads((adapter / "adapter_config.json").read_text())
    raw |= {"target_parameters": None, "target_modules": r".*\.experts\.\d+\.(gate|up|down)_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("fused", [True, False])
def test_a_pair_an_expert_fits_onto_any_storage(tmp_path: Path, fused: bool) -> None:
    kind = "qwen3_5_moe_text"
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build(kind, seed), tmp_path / role, fused)
    wrapped(tmp_path / "aligned", 5).save_pretrained(tmp_path / "packed")
    adapter = per_expert(tmp_path / "packed", tmp_path / "apart")
    (result,) = score(aligned=tmp_path / "aligned", unaligned=tmp_path / "unaligned", adapter=adapter, quiet=True)
    found = deltas(tmp_path / "aligned", tmp_path / "packed")
    weights = [mixtures.experts(mixtures.loaded(kind, tmp_path / role)) for role in ("aligned", "unaligned")]
    assert len(result.cosines) == len(found) == 24
    assert result.plan.expected == 24
    for name, cosine in result.cosines.items():
        place = mixtures.role_of(name)
        assert cosine == pytest.approx(mixtures.gate(weights[0][place], weights[1][place], found[place])[0], abs=1e-5)
    scale(aligned=tmp_path / "aligned", adapter=adapter, factor=0.5, output=tmp_path / "out", quiet=True)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out"))
    assert all(torch.equal(after[n], t * (0.5 if "lora_B" in n else 1)) for n, t in before.items())


def test_one_linear_has_one_safe_delta_whatever_two_adapters_call_it(tmp_path: Path) -> None:
    """PEFT names Mixtral's experts as transformers 5 does, in one tensor; adapters from before as they are stored."""
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build("mixtral", seed), tmp_path / role)
    for seed, name in ((5, "adapter"), (6, "safe")):
        wrapped(tmp_path / "aligned", seed, target_parameters=["experts.down_proj"]).save_pretrained(tmp_path / name)
    before = per_expert(tmp_path / "safe", tmp_path / "before")
    tensors = load_file(before / "adapter_model.safetensors")
    named = {n.replace(".mlp.", ".block_sparse_moe.").replace("down_proj", "w2"): t for n, t in tensors.items()}
    save_file(named, before / "adapter_model.safetensors")
    raw = json.loads((before / "adapter_config.json").read_text()) | {"target_modules": ["w2"]}
    (before / "adapter_config.json").write_text(json.dumps(raw))
    places = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "adapter": tmp_path / "adapter"}
    for name in ("safe", "before"):
        safemerge(**places, safe_adapter=tmp_path / name, threshold=2.0, output=tmp_path / f"out-{name}", quiet=True)
    ours, theirs = (load_file(tmp_path / f"out-{n}" / "adapter_model.safetensors") for n in ("before", "safe"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("packed", ["adapter", "safe_adapter"])
def test_a_pair_of_gate_and_up_does_not_go_with_one_for_each(tmp_path: Path, packed: str) -> None:
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build("qwen3_moe", seed), tmp_path / role)
    for seed, name in ((5, "packed"), (6, "other")):
        wrapped(tmp_path / "aligned", seed).save_pretrained(tmp_path / name)
    apart = per_expert(tmp_path / "other", tmp_path / "apart")
    places = {"adapter": apart, "safe_adapter": apart} | {packed: tmp_path / "packed"}
    places |= {role: tmp_path / role for role in ("aligned", "unaligned")}
    with pytest.raises(RequestError) as refused:
        safemerge(**places, output=tmp_path / "out", quiet=True)
    (offence,) = refused.value.offences
    assert offence.where == str(places["safe_adapter"])
    assert str(apart) in offence.remedy


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    mixtures.save(mixtures.build("qwen3_moe", 1), tmp_path / "aligned")
    wrapped(tmp_path / "aligned", 5).save_pretrained(tmp_path / "packed")
    adapter = per_expert(tmp_path / "packed", tmp_path / "apart")
    tensors = load_file(adapter / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    kept = {name: t for name, t in tensors.items() if not name.startswith(gone)}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(RequestError) as refused:
        scale(aligned=tmp_path / "aligned", adapter=adapter, factor=0.5, output=tmp_path / "out", quiet=True)
    (offence,) = refused.value.offences
    assert offence.what == "model.layers.1.mlp.experts.2.up_proj"


def test_a_layer_that_a_packed_adapter_lacks_is_named(tmp_path: Path) -> None:
    mixtures.save(mixtures.build("qwen3_moe", 1), tmp_path / "aligned")
    wrapped(tmp_path / "aligned", 5).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed/adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".layers.1." not in name}, file)
    with pytest.raises(RequestError) as refused:
        scale(
            aligned=tmp_path / "aligned", adapter=tmp_path / "packed", factor=0.5, output=tmp_path / "out", quiet=True
        )
    assert len(refused.value.offences) == 2 * COUNT


@pytest.mark.parametrize("targets", [[], ["q_proj"]])
def test_a_text_model_s_adapter_fits_its_multimodal_release(tmp_path: Path, targets: list[str]) -> None:
    """Qwen3.5-MoE is released as `model.language_model.`; an adapter may have been trained on the text model alone."""
    kind = "qwen3_5_moe_text"
    for seed, role in enumerate(("aligned", "unaligned"), 1):
        mixtures.save(mixtures.build(kind, seed), tmp_path / role, fused=True)
        as_multimodal(tmp_path / role, tmp_path / f"{role}-vl")
    wrapped(tmp_path / "aligned", 5, target_modules=targets).save_pretrained(tmp_path / "adapter")
    mixtures.save(mixtures.build(kind, 3), tmp_path / "finetuned")
    cosines = {}
    for ending in ("", "-vl"):
        places = {"aligned": tmp_path / f"aligned{ending}", "unaligned": tmp_path / f"unaligned{ending}"}
        (adapter,) = score(**places, adapter=tmp_path / "adapter", quiet=True)
        (full,) = score(**places, finetuned=[tmp_path / "finetuned"], quiet=True)
        prefix = "model.language_model." if ending else "model."
        cosines[ending] = [{n.replace(prefix, "", 1): c for n, c in each.cosines.items()} for each in (adapter, full)]
    assert cosines[""] == cosines["-vl"]
    assert len(cosines[""][0]) == 2 * (2 * COUNT + len(targets))


def as_multimodal(folder: Path, released: Path) -> None:
    released.mkdir()
    tensors = load_file(folder / "model.safetensors")
    renamed = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    save_file(renamed, released / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": False}
    (released / "config.json").write_text(json.dumps(config))
