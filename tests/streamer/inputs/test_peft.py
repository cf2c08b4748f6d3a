"""What is written loads in PEFT and transformers as it is, and computes the base model plus the delta made by hand."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safeshard.streamer import safelora, safemerge, scale

LLAMA = LlamaConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=37, n_positions=16, n_embd=24, n_layer=2, n_head=2)
CONFIGS = {"llama": LLAMA, "tied": LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True}), "gpt2": GPT2}
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"], "tied": ["q_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}  # fmt: skip
LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6},
    "patterns": {
        "r": 4, "lora_alpha": 2, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True,
    },
    "gpt2-patterns": {"r": 2, "lora_alpha": 3, "rank_pattern": {"c_proj": 3}, "alpha_pattern": {"c_fc": 5}},
}  # fmt: skip
TOKENS = torch.arange(10)[None] * 3 % 37


class Zoo:
    """Models and adapters that transformers and PEFT saved, made once each."""

    def __init__(self, root: Path) -> None:
        self.root, self._made = root, dict[tuple[str, ...], Path]()

    def model(self, kind: str, role: str, shard: str = "5GB") -> Path:
        return self._once((kind, role, shard), lambda folder: self._save_model(kind, role, shard, folder))

    def adapter(self, kind: str, role: str, lora: str) -> Path:
        return self._once((kind, role, lora, "adapter"), lambda folder: self._save_adapter(kind, role, lora, folder))

    def inputs(self, kind: str, lora: str) -> dict[str, Path]:
        return {
            "aligned": self.model(kind, "aligned"), "unaligned": self.model(kind, "unaligned"),
            "adapter": self.adapter(kind, "tuned", lora),
        }  # fmt: skip

    def _once(self, key: tuple[str, ...], save: Callable[[Path], None]) -> Path:
        if key not in self._made:
            self._made[key] = self.root / "-".join(key)
            save(self._made[key])
        return self._made[key]

    def _save_model(self, kind: str, role: str, shard: str, folder: Path) -> None:
        torch.manual_seed(["aligned", "unaligned", "finetuned", "safe"].index(role))
        AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder, max_shard_size=shard)

    def _save_adapter(self, kind: str, role: str, lora: str, folder: Path) -> None:
        config = LoraConfig(target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", **LORA[lora])
        model = get_peft_model(load(self.model(kind, "aligned")), config)
        generator = torch.Generator().manual_seed(["tuned", "guard"].index(role) + 50)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        model.save_pretrained(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.double()


def linears(model: PreTrainedModel) -> dict[str, tuple[Tensor, bool]]:
    """Module -> weight as stored, and whether that is in x out."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D))
    return {name: (module.weight, isinstance(module, Conv1D)) for name, module in found}


def peft_deltas(folder: Path, kind: str, lora: str, load_tensors: Any) -> dict[str, Tensor]:
    """scaling B A of each module, from what PEFT's documentation says of the config."""
    options, tensors, deltas = LORA[lora], load_tensors(folder), {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            leaf = module.rpartition(".")[2]
            rank = options.get("rank_pattern", {}).get(leaf, options["r"])
            alpha = options.get("alpha_pattern", {}).get(leaf, options["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
            deltas[module] = scaling * tensors[name.replace("_A.", "_B.")].double() @ tensors[name].double()
    return deltas


def gate(aligned: Tensor, unaligned: Tensor, delta: Tensor) -> tuple[float, Tensor]:
    v = aligned.double() - unaligned.double()
    projected = (v @ v.T / v.norm()) @ delta
    return (projected.flatten() @ delta.flatten() / (projected.norm() * delta.norm())).item(), projected


def expected_logits(zoo: Zoo, kind: str, deltas: dict[str, Tensor]) -> Tensor:
    """The aligned model's, with the deltas added to its weights."""
    model = load(zoo.model(kind, "aligned"))
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.clone()
    )  # a delta on a tied head is the head's alone
    weights = linears(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            weight, transposed = weights[name]
            weight += (delta.T if transposed else delta).float()
    return logits(model)


def assert_loads_in_peft(zoo: Zoo, kind: str, output: Path, deltas: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected)")
        model = PeftModel.from_pretrained(load(zoo.model(kind, "aligned")), output)
    torch.testing.assert_close(logits(model), expected_logits(zoo, kind, deltas), rtol=1e-5, atol=2e-6)


def gates(zoo: Zoo, kind: str, deltas: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
    bases = [linears(load(zoo.model(kind, role))) for role in ("aligned", "unaligned")]
    return {
        name: gate(*(base[name][0].detach().T if base[name][1] else base[name][0].detach() for base in bases), delta)
        for name, delta in deltas.items()
    }


def median(gates: dict[str, tuple[float, Tensor]]) -> float:
    cosines = sorted(cosine for cosine, _ in gates.values())
    return (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2


every_adapter = pytest.mark.parametrize(
    ("kind", "lora"), [("llama", "patterns"), ("tied", "plain"), ("gpt2", "gpt2-patterns")]
)


@every_adapter
def test_reference_and_peft_agree_on_the_input(zoo: Zoo, load_tensors: Any, kind: str, lora: str) -> None:
    adapter = zoo.adapter(kind, "tuned", lora)
    assert_loads_in_peft(zoo, kind, adapter, peft_deltas(adapter, kind, lora, load_tensors))


@every_adapter
@pytest.mark.parametrize("combine", ["linear", "dare_linear", "exact", "svd"])
def test_safemerge(zoo: Zoo, load_tensors: Any, tmp_path: Path, kind: str, lora: str, combine: str) -> None:
    other = lora if combine in ("linear", "dare_linear") else "plain"
    inputs, safe = zoo.inputs(kind, lora), zoo.adapter(kind, "guard", other)
    tuned = peft_deltas(inputs["adapter"], kind, lora, load_tensors)
    guard = peft_deltas(safe, kind, other, load_tensors)
    measured = gates(zoo, kind, tuned)
    threshold = median(measured)
    density = 0.5 if combine == "dare_linear" else None
    out = tmp_path / "out"
    safemerge(
        **inputs, safe_adapter=safe, output=out, threshold=threshold, combine=combine, density=density, quiet=True
    )
    deltas = dict(tuned)
    for name in (n for n, (cosine, _) in measured.items() if cosine < threshold):
        if combine in ("linear", "dare_linear"):  # of these PEFT's definition is in A and B: the product as written
            tensors, key = load_tensors(out), f"base_model.model.{name}"
            deltas[name] = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
            continue
        deltas[name] = 0.8 * tuned[name] + 0.2 * guard[name]
        if combine == "svd":
            u, s, vh = torch.linalg.svd(deltas[name])
            rank = load_tensors(inputs["adapter"])[f"base_model.model.{name}.lora_A.weight"].shape[0]
            deltas[name] = u[:, :rank] * s[:rank] @ vh[:rank]
    assert any((deltas[n] - tuned[n]).norm() > 0.01 for n in deltas)
    assert_loads_in_peft(zoo, kind, out, deltas)


@pytest.mark.parametrize("signs", [(0.8, 0.2), (0.8, -0.2)])
def test_linear_is_what_peft_computes(zoo: Zoo, load_tensors: Any, tmp_path: Path, signs: tuple[float, float]) -> None:
    inputs, safe = zoo.inputs("llama", "plain"), zoo.adapter("llama", "guard", "plain")
    safemerge(**inputs, safe_adapter=safe, output=tmp_path / "out", threshold=1.01, weights=signs, quiet=True)
    model = PeftModel.from_pretrained(load(inputs["aligned"]), inputs["adapter"], "tuned")
    model.load_adapter(safe, "guard")
    model.add_weighted_adapter(["tuned", "guard"], list(signs), "merged", combination_type="linear")
    model.save_pretrained(tmp_path / "peft", selected_adapters=["merged"])
    theirs, ours = load_tensors(tmp_path / "peft/merged"), load_tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@every_adapter
def test_safelora(zoo: Zoo, load_tensors: Any, tmp_path: Path, kind: str, lora: str) -> None:
    inputs = zoo.inputs(kind, lora)
    tuned = peft_deltas(inputs["adapter"], kind, lora, load_tensors)
    measured = gates(zoo, kind, tuned)
    threshold = median(measured)
    safelora(**inputs, output=tmp_path / "out", threshold=threshold, quiet=True)
    deltas = {n: projected if cosine <= threshold else tuned[n] for n, (cosine, projected) in measured.items()}
    assert_loads_in_peft(zoo, kind, tmp_path / "out", deltas)


@every_adapter
def test_scale(zoo: Zoo, load_tensors: Any, tmp_path: Path, kind: str, lora: str) -> None:
    inputs = zoo.inputs(kind, lora)
    scale(aligned=inputs["aligned"], adapter=inputs["adapter"], factor=0.3, output=tmp_path / "out", quiet=True)
    tuned = peft_deltas(inputs["adapter"], kind, lora, load_tensors)
    assert_loads_in_peft(zoo, kind, tmp_path / "out", {n: 0.3 * d for n, d in tuned.items()})


def full_weights(folder: Path) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in load(folder).named_parameters()}


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("method", ["safemerge", "safelora", "scale"])
def test_full_checkpoints_load_in_transformers(zoo: Zoo, tmp_path: Path, kind: str, shard: str, method: str) -> None:
    folders = {r: zoo.model(kind, r) for r in ("unaligned", "finetuned", "safe")} | {
        "aligned": zoo.model(kind, "aligned", shard)
    }
    weights = {role: full_weights(folder) for role, folder in folders.items()}
    common: dict[str, Any] = {r: folders[r] for r in ("aligned", "finetuned")}
    common |= {"output": tmp_path / "out", "quiet": True}
    expected = dict(weights["finetuned"])
    model = load(folders["aligned"])
    stored = {f"{n}.weight": transposed for n, (_, transposed) in linears(model).items() if "lm_head" not in n}
    for name, transposed in stored.items():
        roles = [weights[r][name] for r in ("aligned", "unaligned", "finetuned", "safe")]
        aligned, unaligned, tuned, safe = (weight.T if transposed else weight for weight in roles)
        new = {
            "safemerge": aligned + 0.8 * (tuned - aligned) + 0.2 * (safe - aligned),
            "safelora": aligned + gate(aligned, unaligned, tuned - aligned)[1], "scale": tuned,
        }[method]  # fmt: skip
        expected[name] = new.T if transposed else new
    if method == "safemerge":
        safemerge(**common, unaligned=folders["unaligned"], safe=folders["safe"], threshold=1.01)
    elif method == "safelora":
        safelora(**common, unaligned=folders["unaligned"], threshold=1.01)
    else:
        scale(**common, factor=0.25)
        expected = {n: w + 0.25 * (weights["finetuned"][n] - w) for n, w in weights["aligned"].items()}
    assert (len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1) == (shard == "20KB")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected[name])
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-5, atol=2e-6)


def test_modules_to_save_load_in_peft(zoo: Zoo, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(load(zoo.model("llama", "aligned")), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("modules_to_save" in name):
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 3
    model.save_pretrained(tmp_path / "tuned")
    bases = {role: zoo.model("llama", role) for role in ("aligned", "unaligned")}
    safelora(**bases, adapter=tmp_path / "tuned", threshold=-1, output=tmp_path / "out", quiet=True)
    again = PeftModel.from_pretrained(load(bases["aligned"]), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), logits(model.eval()))


def test_output_config_differs_only_where_it_must(zoo: Zoo, tmp_path: Path) -> None:
    inputs = zoo.inputs("llama", "patterns")
    given = json.loads((inputs["adapter"] / "adapter_config.json").read_text())
    safelora(**inputs, output=tmp_path / "projected", threshold=0.1, quiet=True)
    assert json.loads((tmp_path / "projected/adapter_config.json").read_text()) == given
    safe = shutil.copytree(inputs["adapter"], tmp_path / "safe")
    pairs = load_file(safe / "adapter_model.safetensors")
    save_file({key: -tensor for key, tensor in pairs.items()}, safe / "adapter_model.safetensors")
    safemerge(**inputs, safe_adapter=safe, output=tmp_path / "merged", quiet=True)
    merged = json.loads((tmp_path / "merged/adapter_config.json").read_text())
    changed = {key for key in given if merged[key] != given[key]}
    assert changed == {"lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
