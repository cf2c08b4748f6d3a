"""Opening checkpoints by their headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.sources import open_source
from safeshard.streamer.tensor_names import layer_of, natural

LAYER = "model.layers.0.mlp.up_proj"


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(open_source(folder))


def refused(folder: Path) -> tuple[Offence, ...]:
    with pytest.raises(RequestError) as caught:
        opened(folder)
    return caught.value.offences


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder of one file; dtypes and shapes are free."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found_where_it_lies(world: Any, shards: int) -> None:
    tensors = world.llama() | {"model.norm.weight": torch.ones(24), "half": torch.ones(2, 3, dtype=torch.float16)}
    folder = world.checkpoint("c", tensors, shards)
    checkpoint = opened(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, ref in checkpoint.tensors.items():
        content = (folder / ref.file).read_bytes()[ref.offset : ref.offset + ref.nbytes]
        assert content == tensors[name].view(torch.uint8).numpy().tobytes()
        assert ref.shape == tensors[name].shape
    assert [f.size for f in checkpoint.files] == [p.stat().st_size for p in sorted(folder.glob("*.safetensors"))]
    assert {checkpoint.tensors[n].dtype for n in ("half", "model.norm.weight", f"{LAYER}.weight")} == {
        "F16",
        "F32",
        "BF16",
    }


def test_linears_are_the_2d_weights_of_numbered_layers_in_model_order(world: Any) -> None:
    tensors = {name: t for name, t in world.llama(12).items() if "q_proj" in name or "norm" in name or "embed" in name}
    checkpoint = opened(world.checkpoint("c", tensors, 2))
    assert list(checkpoint.linears) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]


def test_a_single_file_may_have_any_name(world: Any) -> None:
    folder = world.checkpoint("c", world.llama())
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "config.json").unlink()
    checkpoint = opened(folder)
    assert (checkpoint.files[0].name, checkpoint.config) == ("weights.safetensors", {})


def test_pickles_are_refused_beside_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (offence,) = refused(tmp_path)
    assert offence.got == "a pickle checkpoint (pytorch_model.bin)"
    assert "pickles are never opened" in offence.remedy


def test_an_empty_folder_several_files_and_an_adapter_are_refused(world: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty)[0].got == "no safetensors file"
    several = world.checkpoint("c", world.llama(), 3)
    (several / INDEX).unlink()
    (several / "model-00003-of-00003.safetensors").rename(several / "more.safetensors")
    assert refused(several)[0].got == "2 of 3 shards without an index"
    assert refused(world.adapter("a", world.llama()))[0].got == "a PEFT adapter"


@pytest.mark.parametrize(
    ("file", "got"),
    [
        ("../secret.safetensors", "a path"),
        ("/etc/secret.safetensors", "a path"),
        ("..\\secret.safetensors", "a path"),
        ("sub/model.safetensors", "a path"),
        ("", "another format"),
        ("..", "another format"),
        ("pytorch_model.bin", "another format"),
        ("gone.safetensors", "no such file"),
        ("nul\0.safetensors", "no such file"),
    ],
)
def test_an_index_names_files_of_its_folder(world: Any, file: str, got: str) -> None:
    folder = world.checkpoint("c", world.llama(), 3)
    save_file({"secret": torch.ones(1)}, folder.parent / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][f"{LAYER}.weight"] = file
    index["weight_map"]["model.norm.weight"] = "also-gone.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    offences = {offence.what: offence.got for offence in refused(folder)}
    assert offences == {file: got, "also-gone.safetensors": "no such file"}


def test_a_link_that_leads_outside_is_refused(world: Any, tmp_path: Path) -> None:
    folder = world.checkpoint("c", world.llama())
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert refused(folder)[0].expected == "a file inside the folder"


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_a_malformed_index_is_refused(world: Any, index: Any) -> None:
    folder = world.checkpoint("c", world.llama(), 2)
    (folder / INDEX).write_text(json.dumps(index))
    (offence,) = refused(folder)
    assert (offence.what, offence.got) == ("weight_map", "malformed")


def test_index_and_files_must_agree(world: Any) -> None:
    folder = world.checkpoint("c", world.llama(), 2)
    index = json.loads((folder / INDEX).read_text())
    moved = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.gone.weight"] = moved
    (folder / INDEX).write_text(json.dumps(index))
    assert {(o.what, o.got) for o in refused(folder)} == {
        ("model.gone.weight", "not there"),
        ("model.norm.weight", "not listed"),
    }


def test_a_tensor_in_two_files_is_refused(world: Any) -> None:
    tensors = world.llama()
    folder = world.checkpoint("c", tensors, 2)
    first, second = sorted(folder.glob("*.safetensors"))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    save_file({n: tensors[n] for n in tensors if weight_map[n] == second.name or n == "lm_head.weight"}, second)
    assert weight_map["lm_head.weight"] == first.name
    offences = [(o.what, o.got) for o in refused(folder) if o.expected == "a tensor in one file"]
    assert offences == [("lm_head.weight", f"also in {first.name}")]


def test_two_checkpoints_in_one_folder_are_refused(world: Any) -> None:
    folder = world.checkpoint("c", world.llama(), 2)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert refused(folder)[0].expected == "one checkpoint in the folder"


def test_every_broken_header_and_config_is_named(world: Any) -> None:
    folder = world.checkpoint("c", world.llama(), 3)
    for file in sorted(folder.glob("*.safetensors"))[:2]:
        file.write_bytes(file.read_bytes()[:-1])
    (folder / "config.json").write_text("[]")
    offences = refused(folder)
    assert [Path(o.where).name for o in offences[:2]] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2)]
    assert all("truncated" in o.got for o in offences[:2])
    assert (Path(offences[2].where).name, offences[2].got) == ("config.json", "list")


def test_a_config_that_is_no_json_is_refused(world: Any) -> None:
    folder = world.checkpoint("c", world.llama())
    (folder / "config.json").write_text("{")
    assert refused(folder)[0].expected == "valid JSON"


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
@pytest.mark.parametrize("embedding", ["model.embed_tokens", "transformer.wte"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, config: dict[str, Any], embedding: str) -> None:
    tensors = {f"{embedding}.weight": torch.ones(5, 2), "model.rte.weight": torch.ones(2, 2)}
    checkpoint = opened(write(tmp_path / "c", tensors, **config))
    head = checkpoint.weight("lm_head")
    assert checkpoint.tied
    assert head is not None
    assert head.name == f"{embedding}.weight"
    assert checkpoint.weight("other_head") is None


def test_a_head_is_not_tied_where_it_is_stored_or_the_config_says_no(tmp_path: Path) -> None:
    embedding = {"model.embed_tokens.weight": torch.ones(5, 2)}
    stored = opened(write(tmp_path / "a", embedding | {"lm_head.weight": torch.ones(5, 2)}, tie_word_embeddings=True))
    head = stored.weight("lm_head")
    assert head is not None
    assert head.name == "lm_head.weight"
    assert not stored.tied
    nested = {"text_config": {"tie_word_embeddings": False}}
    for index, config in enumerate(({"tie_word_embeddings": False}, nested)):
        assert opened(write(tmp_path / f"b{index}", embedding, **config)).weight("lm_head") is None
    two = embedding | {"encoder.embed_tokens.weight": torch.ones(5, 2)}
    assert opened(write(tmp_path / "c", two)).weight("lm_head") is None


def tiny(kind: str) -> Any:
    """A small transformers model with biases."""
    import transformers as tf

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 11,
    }
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    if kind == "qwen2":
        return tf.Qwen2ForCausalLM(tf.Qwen2Config(**sizes, num_key_value_heads=1))
    return tf.PhiForCausalLM(tf.PhiConfig(**sizes))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi"])
def test_transposed_storage_is_seen_from_biases(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    checkpoint = opened(tmp_path)
    modules = {name: module for name, module in model.named_modules() if name in checkpoint.linears}
    assert len(modules) == len(checkpoint.linears) >= 4
    for name, module in modules.items():
        transposed = type(module).__name__ == "Conv1D"
        assert checkpoint.linears[name].transposed == transposed, name
        assert checkpoint.linears[name].shape == tuple(module.weight.shape[:: -1 if transposed else 1])
    assert checkpoint.stores_transposed == (kind == "gpt2")
    head = checkpoint.weight("lm_head")
    assert head is not None
    assert not head.transposed


def test_without_biases_weights_are_out_x_in(world: Any) -> None:
    assert not opened(world.checkpoint("c", world.llama())).stores_transposed


INT8, FP8 = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4, 4).to(torch.float8_e4m3fn)
UINT8, INT32, HALF = (
    torch.zeros(8, 1, dtype=torch.uint8),
    torch.zeros(2, 4, dtype=torch.int32),
    torch.zeros(4, 4).half(),
)
QUANTISED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "bitsandbytes": ({"weight": UINT8, "weight.absmax": HALF, "weight.quant_map": HALF}, "weight.absmax"),
    "bitsandbytes (int8)": ({"weight": INT8, "SCB": HALF}, "SCB"),
    "GPTQ or AWQ, with zero points": ({"qweight": INT32, "qzeros": INT32, "scales": HALF, "g_idx": INT32[0]}, "qzeros"),
    "fp8 in blocks, without weight_block_size in config.json": (
        {"weight": FP8, "weight_scale_inv": HALF[:2]},
        "weight",
    ),
    "F8_E4M3 without a scale": ({"weight": FP8}, "weight"),
    "quantised with zero points": (
        {"weight_packed": INT32, "weight_scale": HALF, "weight_shape": INT32[0, :2], "weight_zero_point": INT32},
        "weight_zero_point",
    ),
    "HQQ": ({"W_q": UINT8, "scale": HALF, "zero": HALF}, "W_q"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_by_name(world: Any, kind: str) -> None:
    parts, culprit = QUANTISED[kind]
    tensors = world.llama()
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{part}": tensor.clone() for part, tensor in parts.items()}
    checkpoint = opened(world.checkpoint("c", tensors, quantization_config={"quant_method": "theirs"}))
    (offence,) = checkpoint.treatable([LAYER, "model.layers.1.mlp.up_proj"])
    assert (offence.what, offence.got) == (f"{LAYER}.{culprit}", kind)
    everything = {o.what for o in [*checkpoint.treatable(checkpoint.linears), *checkpoint.untreatable_tensors()]}
    assert everything == {f"{LAYER}.{culprit}"}


def test_other_dtypes_and_shapes_are_refused_by_name(world: Any) -> None:
    tensors = world.llama() | {f"{LAYER}.weight": INT8, "model.layers.1.mlp.up_proj.weight": torch.ones(2, 3, 4)}
    checkpoint = opened(world.checkpoint("c", tensors))
    modules = [LAYER, "model.layers.1.mlp.up_proj", "model.norm", "model.layers.0.mlp.down_proj", "gone"]
    assert [(o.what, o.got) for o in checkpoint.treatable(modules)] == [
        (f"{LAYER}.weight", "I8"),
        ("model.layers.1.mlp.up_proj.weight", "[2, 3, 4]"),
        ("model.norm.weight", "[24]"),
    ]


def test_fused_experts_of_an_unknown_family_are_refused_and_separate_ones_are_not(world: Any) -> None:
    expert = "model.layers.0.mlp.experts"
    separate = {f"{expert}.{i}.up_proj.weight": torch.ones(3, 4) for i in range(2)} | {f"{expert}.bias": torch.ones(2)}
    checkpoint = opened(world.checkpoint("separate", world.llama() | separate))
    assert list(checkpoint.untreatable_tensors()) == []
    assert separate.keys() - {f"{expert}.bias"} <= {f"{name}.weight" for name in checkpoint.linears}
    fused = {f"{expert}.gate_up_proj": torch.ones(2, 3, 4), f"{expert}.mlp.w1": torch.ones(6, 4)}
    offences = list(opened(world.checkpoint("fused", world.llama() | fused)).untreatable_tensors())
    assert sorted((o.what, o.got) for o in offences) == [
        (f"{expert}.gate_up_proj", "experts fused to [2, 3, 4] in a model_type 'llama' that no table knows"),
        (f"{expert}.mlp.w1", "experts fused to [6, 4] in a model_type 'llama' that no table knows"),
    ]
    assert all("families.py" in o.remedy for o in offences)


def test_names_with_absurd_numbers_are_plain_text(world: Any) -> None:
    name = f"model.layers.{'9' * 5000}.mlp.up_proj.weight"
    checkpoint = opened(
        world.checkpoint("c", world.llama() | {name: torch.ones(2, 2), "a.²\u0663.weight": torch.ones(2, 2)})
    )
    assert layer_of(name) is None
    assert name.removesuffix(".weight") not in checkpoint.linears
    names = ["a.10.b", "a.2.b", "a.9999999999.b", "a.2", "a.x"]
    assert sorted(names, key=natural) == ["a.2", "a.2.b", "a.10.b", "a.9999999999.b", "a.x"]
