"""Opening adapters, against PEFT: ranks, scalings and deltas are those of the layers it made the files from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.adapter import Adapter, open_adapter
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import open_source

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=12, n_layer=3, n_head=2, vocab_size=16, n_positions=8)
    )


def opened(adapter: Path, base: Path) -> Adapter:
    return open_adapter(open_source(adapter), open_checkpoint(open_source(base)))


def refused(adapter: Path, base: Path) -> tuple[Offence, ...]:
    with pytest.raises(RequestError) as caught:
        opened(adapter, base)
    return caught.value.offences


def trained(base: Any, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A PEFT model with random A and B, whose base was saved to `folder`/base."""
    base.to(dtype).save_pretrained(folder / "base")
    lora = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | config
    return peft.get_peft_model(base, peft.LoraConfig(**lora), autocast_adapter_dtype=False)


def check_against(model: Any, adapter: Adapter, name: str = "default") -> None:
    """Every LoRA layer of a PEFT model is a module of `adapter`, with its rank, scaling and delta; and no other is."""
    layers = {path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    assert len(adapter.modules) == adapter.expected == len(layers) > 0
    by_own_name = {adapter.own_name(module): lora for module, lora in adapter.modules.items()}
    for path, layer in layers.items():
        lora = by_own_name[path.replace("_orig_mod.", "")]
        a, b = (_read(adapter, ref) for ref in (lora.a, lora.b))
        assert (lora.rank, lora.scaling) == (layer.r[name], layer.scaling[name])
        assert torch.equal(a, layer.lora_A[name].weight)
        assert torch.equal(b, layer.lora_B[name].weight)
        delta = layer.get_delta_weight(name)
        delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
        torch.testing.assert_close((lora.scaling * (b.double() @ a.double())).to(delta.dtype), delta)


def _read(adapter: Adapter, ref: Any) -> torch.Tensor:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[ref.dtype]
    data = bytearray(adapter.source.read(ref.file, ref.offset, ref.offset + ref.nbytes))
    return torch.frombuffer(data, dtype=dtype).view(ref.shape)


CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.(1|2)\..*(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
    "excluded": {"target_modules": ATTENTION, "exclude_modules": ["k_proj", "model.layers.0.self_attn.o_proj"]},
    "excluded by regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.[12].*"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": 1},
    "layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "rank pattern": {"target_modules": ATTENTION, "rank_pattern": {r"layers\.1\..*": 5, "q_proj": 3}},
    "anchored": {
        "target_modules": ATTENTION,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 4, "^layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.(q|k)_proj": 9},
    },
    "first pattern wins": {
        "target_modules": ATTENTION,
        "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "v_proj": 5, "z?._proj": 7},
        "rank_pattern": {"q_proj": 1, "z?._proj": 3},
    },
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 7}},
    "rsLoRA with alphas": {"target_modules": ATTENTION, "use_rslora": True, "alpha_pattern": {"q_proj": 5}},
    "float alpha": {"target_modules": ATTENTION, "lora_alpha": 0.3},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", [llama, qwen2])
def test_it_means_what_peft_computes(tmp_path: Path, family: Callable[[], Any], kind: str) -> None:
    model = trained(family(), tmp_path, **CONFIGS[kind])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    check_against(model, adapter)
    assert str(adapter.names) == ""
    assert adapter.saved == {}


def test_overlapping_patterns_mean_what_peft_loads(tmp_path: Path) -> None:
    patterns = {"q_proj": 3, r"model\.layers\.1\..*": 5}  # PEFT sorts them when it saves
    base = llama()
    trained(base, tmp_path, target_modules=ATTENTION, alpha_pattern=patterns).save_pretrained(tmp_path / "adapter")
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    check_against(loaded, adapter)
    assert adapter.modules["model.layers.1.self_attn.q_proj"].scaling == 2.5


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("target", ["all-linear", ["c_attn", "lm_head"], [r"c_proj", "c_fc"]])
def test_transposed_weights_are_understood(tmp_path: Path, target: Any, fan_in_fan_out: bool) -> None:
    model = trained(gpt2(), tmp_path, target_modules=target, fan_in_fan_out=fan_in_fan_out)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    check_against(model, opened(tmp_path / "adapter", tmp_path / "base"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_may_have_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained(llama(), tmp_path, dtype, target_modules=ATTENTION)
    model.save_pretrained(tmp_path / "adapter")
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    check_against(model, adapter)
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    assert {lora.a.dtype for lora in adapter.modules.values()} == {names[dtype]}


def test_a_second_adapter_of_one_model(tmp_path: Path) -> None:
    model = trained(llama(), tmp_path, target_modules=ATTENTION)
    second = peft.LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, target_modules=ATTENTION)
    model.add_adapter("second", second)
    model.save_pretrained(tmp_path / "adapter")
    check_against(model, opened(tmp_path / "adapter", tmp_path / "base"))
    check_against(model, opened(tmp_path / "adapter" / "second", tmp_path / "base"), "second")


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"], ["input_layernorm", "model.norm"]])
def test_modules_to_save_are_carried_whole(tmp_path: Path, saved: list[str]) -> None:
    model = trained(llama(), tmp_path, target_modules="all-linear", modules_to_save=saved)
    model.save_pretrained(tmp_path / "adapter")
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    check_against(model, adapter)
    keys = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_" not in key]
    assert sorted(adapter.saved) == sorted(keys)
    assert len(keys) >= len(saved)
    assert all(any(name in key for name in saved) for key in keys)


def test_resized_embeddings_are_carried_whole(tmp_path: Path) -> None:
    model = trained(llama(), tmp_path, target_modules=ATTENTION)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    check_against(model, adapter)
    assert {key.split(".")[-2] for key in adapter.saved} == {"embed_tokens", "lm_head"}


def test_an_adapter_of_a_compiled_model(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, init_lora_weights=False, target_modules=ATTENTION, rank_pattern={"q_proj": 3}
    )
    model = peft.get_peft_model(torch.compile(base), config)
    model.save_pretrained(tmp_path / "adapter")
    assert any("_orig_mod" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    check_against(model, opened(tmp_path / "adapter", tmp_path / "base"))


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    """Rename the tensors of an adapter."""
    file = adapter / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


OUTER = [
    lambda key: "module." + key,
    lambda key: "_orig_mod." + key,
    lambda key: key.removeprefix("base_model.model."),
    lambda key: key.replace(".weight", ".default.weight"),
    lambda key: key.replace(".model.model.", ".model._fsdp_wrapped_module.model.").replace(".self", "._orig_mod.self"),
    lambda key: "module." + key.replace("base_model.", "base_model._fsdp_wrapped_module."),
    lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
]  # fmt: skip


@pytest.mark.parametrize("change", OUTER)
def test_wrappers_in_names_are_seen_through(world: Any, change: Callable[[str], str]) -> None:
    tensors = world.llama()
    base, folder = world.checkpoint("base", tensors), world.adapter("a", tensors)
    plain = opened(folder, base)
    rename(folder, change)
    wrapped = opened(folder, base)
    assert wrapped.modules.keys() == plain.modules.keys()
    assert [wrapped.own_name(m) for m in wrapped.modules] == [plain.own_name(m) for m in plain.modules]
    assert str(wrapped.names) == ""


@pytest.mark.parametrize(
    ("own", "base", "note"),
    [
        ("model.", "language_model.model.", "module prefix '' read as 'language_model.'"),
        ("model.language_model.", "language_model.model.",
         "module prefix 'model.language_model.' read as 'language_model.model.'"),
        ("transformer.", "", "module prefix 'transformer.' read as ''"),
        ("", "model.", "module prefix '' read as 'model.'"),
    ],
)  # fmt: skip
def test_one_prefix_may_differ_for_all(world: Any, own: str, base: str, note: str) -> None:
    tensors = world.llama()
    folder = world.adapter("a", tensors, r=4, alpha_pattern={f"^{own}layers.1.mlp.up_proj".replace(".", r"\."): 20})
    rename(folder, lambda key: key.replace("base_model.model.model.", f"base_model.model.{own}"))
    tower = {
        "vision_tower.blocks.0.q_proj.weight": torch.ones(3, 3),
        "mtp.layers.0.self_attn.q_proj.weight": torch.ones(2, 2),
    }
    renamed = {name.replace("model.", base, 1): tensor for name, tensor in tensors.items()}
    adapter = opened(folder, world.checkpoint("base", renamed | tower))
    assert str(adapter.names) == note
    assert len(adapter.modules) == adapter.expected == 14
    assert {m: lora.scaling for m, lora in adapter.modules.items() if lora.scaling != 2} == {
        f"{base}layers.1.mlp.up_proj": 5.0
    }
    assert adapter.own_name(f"{base}layers.0.mlp.up_proj") == f"{own}layers.0.mlp.up_proj"


def test_an_ambiguous_prefix_is_not_guessed(world: Any) -> None:
    tensors = world.llama()
    folder = world.adapter("a", tensors)
    twice = {
        f"{tower}.{name}": t.clone() for tower in ("one", "two") for name, t in tensors.items() if "layers" in name
    }
    [offence] = refused(folder, world.checkpoint("base", twice))
    assert offence.what == "model.layers"
    assert offence.got == "one.model.layers or two.model.layers, which fit equally well"


def test_layers_are_never_taken_for_one_another(world: Any) -> None:
    tensors = world.llama(layers=1)
    folder = world.adapter("a", tensors)
    rename(folder, lambda key: key.replace("layers.0", "layers.1"))
    assert {offence.got for offence in refused(folder, world.checkpoint("base", tensors))} >= {"no such weight"}


def test_an_anchored_pattern_that_a_wrapper_hides_is_refused(world: Any) -> None:
    tensors = world.llama(layers=1)
    base = world.checkpoint("base", tensors)
    folder = world.adapter("a", tensors, alpha_pattern={"^model.layers.0.mlp.up_proj": 3})
    rename(folder, lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."))
    assert [(o.what, o.got) for o in refused(folder, base)] == [
        ("_orig_mod.model.layers.0.mlp.up_proj", "several readings")
    ]


def test_a_tied_head_takes_the_embedding_s_weight(world: Any) -> None:
    tensors = {name: tensor for name, tensor in world.llama().items() if name != "lm_head.weight"}
    pairs = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 24),
        "base_model.model.lm_head.lora_B.weight": torch.ones(32, 4),
    }
    folder = world.adapter("a", tensors, tensors=pairs, target_modules=["lm_head"])
    adapter = opened(folder, world.checkpoint("tied", tensors, tie_word_embeddings=True))
    assert (list(adapter.modules), adapter.expected) == (["lm_head"], 1)
    assert refused(folder, world.checkpoint("untied", tensors))[0].got == "no such weight"


def test_experts_may_be_separate_2d_tensors(world: Any) -> None:
    names = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}" for i in range(2) for e in range(11) for w in ("w1", "w2")
    ]
    base = {f"{name}.weight": torch.ones(6, 4) for name in names}
    pairs = {f"base_model.model.{n}.lora_A.weight": torch.ones(2, 4) for n in names}
    pairs |= {f"base_model.model.{n}.lora_B.weight": torch.ones(6, 2) for n in names}
    folder = world.adapter("a", base, rank=2, tensors=pairs, target_modules=["w1", "w2"])
    assert list(opened(folder, world.checkpoint("base", base)).modules) == names


def test_modules_that_the_config_targets_but_the_file_lacks_are_refused(world: Any) -> None:
    tensors = world.llama()
    base = world.checkpoint("base", tensors, num_hidden_layers=2)
    pairs = {key: t for key, t in world.pairs(tensors, 4, 0).items() if "layers.1.mlp.up_proj" not in key}
    for name, target in (("list", ["up_proj", "q_proj"]), ("regex", r".*(up|q)_proj"), ("all", "all-linear")):
        kept = {key: t for key, t in pairs.items() if "up_proj" in key or "q_proj" in key}
        (offence,) = refused(world.adapter(name, tensors, tensors=kept, target_modules=target), base)
        assert (offence.what, offence.got) == ("model.layers.1.mlp.up_proj", "none")
    head = world.adapter("head", tensors, target_modules=[key.split(".")[-1] for key in ("mlp.up_proj", "lm_head")])
    assert "lm_head" in {offence.what for offence in refused(head, base)}


def test_layers_beyond_the_model_are_not_expected(world: Any) -> None:
    tensors = world.llama(layers=3)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    adapter = opened(world.adapter("a", kept), world.checkpoint("base", tensors, num_hidden_layers=2))
    assert len(adapter.modules) == adapter.expected == 14
    assert len(refused(world.adapter("b", kept), world.checkpoint("base3", tensors, num_hidden_layers=3))) == 7


def test_every_fault_of_the_weights_is_named(world: Any) -> None:
    tensors = world.llama()
    base = world.checkpoint("base", tensors)
    prefix = "base_model.model.model.layers"
    pairs = world.pairs(tensors, 4, 0)
    del pairs[f"{prefix}.0.mlp.up_proj.lora_B.weight"]
    pairs[f"{prefix}.0.mlp.down_proj.lora_A.weight"] = torch.ones(3, 40)
    pairs[f"{prefix}.1.mlp.down_proj.lora_B.weight"] = torch.ones(24, 4, dtype=torch.float64)
    pairs[f"{prefix}.1.mlp.up_proj.lora_A.other.weight"] = torch.ones(4, 24)
    pairs[f"{prefix}.9.mlp.up_proj.lora_A.weight"] = torch.ones(4, 24)
    pairs[f"{prefix}.0.mlp.up_proj.lora_magnitude_vector"] = torch.ones(40)
    pairs["base_model.model.model.norm.lora_A.weight"] = torch.ones(4, 24)
    pairs["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 32)
    got = {offence.what.removeprefix("base_model.model.model."): offence.got for offence in refused(
        world.adapter("a", tensors, tensors=pairs), base)}  # fmt: skip
    assert got == {
        "model.layers.0.mlp.up_proj.lora_B.weight": "one of them",
        "layers.0.mlp.down_proj.lora_A.weight": "[3, 40]",
        "layers.1.mlp.down_proj.lora_B.weight": "F64",
        "layers.1.mlp.up_proj.lora_A.weight": "several",
        "model.layers.9.mlp.up_proj": "no such weight",
        "layers.0.mlp.up_proj.lora_magnitude_vector": "an unknown tensor",
        "model.norm.weight": "[24]",
        "model.embed_tokens.lora_embedding_B": "one of them",
        "model.embed_tokens": "not a target",
    }


def test_config_and_weights_must_agree(world: Any) -> None:
    tensors = world.llama(layers=1)
    base = world.checkpoint("base", tensors)
    (rank,) = refused(world.adapter("rank", tensors, r=8), base)
    assert rank.where.endswith("rank/adapter_config.json")
    assert (rank.what, rank.got) == ("r", "8")
    assert rank.expected == "4, the rank of A and B in every module"
    pattern = refused(world.adapter("pattern", tensors, rank_pattern={"q_proj": 5}), base)
    assert [o.expected for o in pattern] == ["[5, 24]", "[24, 5]"]
    target = refused(world.adapter("target", tensors, exclude_modules=["q_proj"]), base)
    assert [(o.what, o.got) for o in target] == [("model.layers.0.self_attn.q_proj", "not a target")]


def test_an_adapter_of_another_model_is_refused(world: Any) -> None:
    folder = world.adapter("a", world.llama())
    world.sizes["inner"] = 44
    shapes = refused(folder, world.checkpoint("wider", world.llama()))
    assert len(shapes) == 6
    assert "base model" in shapes[0].remedy
    world.sizes["inner"] = 40
    names = {name.replace("self_attn", "attn"): tensor for name, tensor in world.llama().items()}
    assert {o.got for o in refused(folder, world.checkpoint("other", names))} >= {"no such weight"}


def test_where_no_module_fits_the_base_is_said_to_be_another(world: Any) -> None:
    """In one sentence, whatever layers and ranks there are besides."""
    folder = world.adapter("a", world.llama(layers=3), r=8)
    world.sizes.update(hidden=48, inner=80)
    base = world.checkpoint("wider", world.llama(layers=2), num_hidden_layers=2)
    (offence,) = refused(folder, base)
    assert str(offence).startswith(
        f"{folder}/adapter_model.safetensors: expected an adapter of {base}, of hidden size 48"
    )
    assert offence.got == "hidden size 24"
    assert "own base model" in offence.remedy
    world.sizes.update(hidden=24, inner=44)
    mlp = world.llama(layers=1)
    kept = {key: t for key, t in mlp.items() if "mlp" in key}
    names = ("gate_proj", "up_proj", "down_proj")
    narrow = world.adapter("b", mlp, tensors=world.pairs(kept, 4, 0), target_modules=list(names))
    world.sizes["inner"] = 40
    (offence,) = refused(narrow, world.checkpoint("narrower", world.llama(layers=1)))
    assert (offence.got, offence.expected.rpartition(" is ")[2]) == ("no module that fits: 44 x 24", "40 x 24")


def test_an_adapter_of_a_quantised_model_is_refused_as_such(world: Any) -> None:
    tensors = world.llama(layers=1)
    folder = world.adapter("a", tensors)
    packed = {n.replace("_proj.weight", "_proj.qweight"): torch.zeros(2, 2, dtype=torch.int32) for n in tensors}
    offences = refused(folder, world.checkpoint("base", packed))
    assert len(offences) == 7
    assert {offence.got for offence in offences} == {"GPTQ or AWQ"}


def test_what_is_no_adapter_is_refused(world: Any, tmp_path: Path) -> None:
    tensors = world.llama()
    base = world.checkpoint("base", tensors)
    assert [o.expected for o in refused(base, base)] == ["adapter_model.safetensors and adapter_config.json"]
    pickled = world.adapter("pickled", tensors)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert [o.got for o in refused(pickled, base)] == ["adapter_model.bin, a pickle"]
    empty = world.adapter("empty", tensors, tensors={"base_model.model.lm_head.weight": tensors["lm_head.weight"]})
    assert refused(empty, base)[0].expected == "lora_A and lora_B tensors"
    broken = world.adapter("broken", tensors)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 7)
    assert refused(broken, base)[0].got == "7 bytes"
    (broken / "adapter_config.json").write_text("{")
    assert refused(broken, base)[0].expected == "valid JSON"


VARIANTS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "bias": {"bias": "all"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_that_peft_writes_are_refused(tmp_path: Path, key: str) -> None:
    model = trained(qwen2(), tmp_path, **({"target_modules": ATTENTION} | VARIANTS[key]))
    model.save_pretrained(tmp_path / "adapter")
    assert [offence.what for offence in refused(tmp_path / "adapter", tmp_path / "base")] == [key]
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: None if key != "bias" else "none"}))
    if key not in ("alora_invocation_tokens", "init_lora_weights"):  # these leave no trace in the weights
        assert refused(tmp_path / "adapter", tmp_path / "base")


def test_a_weight_that_is_targeted_as_a_parameter_is_that_of_its_module(tmp_path: Path) -> None:
    """Ranks and alphas go by the parameter's name."""
    model = trained(
        qwen2(), tmp_path, target_modules=["v_proj"], target_parameters=["q_proj.weight"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj\.weight": 3}, alpha_pattern={r"0\.self_attn\.q_proj\.weight": 5},
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in qwen2_weights(tmp_path).items()}
    model.save_pretrained(tmp_path / "adapter")
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    after = model.merge_and_unload().state_dict()
    queries = [name for name in adapter.modules if name.endswith("q_proj")]
    assert [adapter.modules[name].rank for name in queries] == [2, 3, 2]
    assert len(adapter.modules) == adapter.expected == 6
    assert adapter.own_name(queries[0]) == f"{queries[0]}.weight"
    for name, pair in adapter.modules.items():
        delta = pair.scaling * held[pair.b.name] @ held[pair.a.name]
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + delta, rtol=0, atol=1e-6)


def qwen2_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "base/model.safetensors")


def test_a_lora_on_the_embedding_of_patches_is_a_linear_of_pixels(world: Any) -> None:
    """Siglip 2's, and so LFM2-VL's, which PEFT's "all-linear" targets."""
    patches = "model.vision_tower.embeddings.patch_embedding"
    tensors = world.llama() | {f"{patches}.weight": torch.randn(24, 30)}
    base = world.checkpoint("base", tensors)
    key = f"base_model.model.{patches}.lora"
    pairs = {f"{key}_A.weight": torch.randn(4, 30), f"{key}_B.weight": torch.randn(24, 4)}
    adapter = opened(world.adapter("adapter", tensors, tensors=pairs, target_modules=["patch_embedding"]), base)
    [(name, pair)] = adapter.modules.items()
    assert (name, pair.a.shape, pair.b.shape) == (patches, (4, 30), (24, 4))


def test_a_lora_on_the_embedding_is_a_linear_of_tokens(tmp_path: Path) -> None:
    model = trained(llama(), tmp_path, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = opened(tmp_path / "adapter", tmp_path / "base")
    pair = adapter.modules["model.embed_tokens"]
    vocabulary, hidden = model.get_base_model().config.vocab_size, model.get_base_model().config.hidden_size
    assert (pair.a.shape[1], pair.b.shape[0]) == (vocabulary, hidden)
    assert adapter.own_name("model.embed_tokens") == "model.embed_tokens"
    assert len(adapter.modules) == adapter.expected
