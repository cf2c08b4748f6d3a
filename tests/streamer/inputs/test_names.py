"""Names of other inputs: one architecture under other prefixes, and what an input may lack."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safeshard.manifests.errors import RequestError
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.inputs.names.apply import in_names_of
from safeshard.streamer.inputs.names.exchange import exchange
from safeshard.streamer.inputs.names.parts import part_of, stack_of
from safeshard.streamer.inputs.names.unbuilt import excused
from safeshard.streamer.sources import open_source

transformers = pytest.importorskip("transformers")


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(open_source(str(folder)))


def test_a_name_is_cut_before_its_first_number() -> None:
    assert stack_of("model.layers.3.mlp.experts.11.up_proj") == ("model.layers", ".3.mlp.experts.11.up_proj")
    assert stack_of("0.weight") == ("", "0.weight")
    assert stack_of("model.norm.weight") is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.mlp.up_proj", ""), ("model.language_model.layers.0", ""), ("lm_head.weight", ""),
        ("model.text_model.layers.1", ""), ("thinker.model.layers.1", ""),
        ("model.vision_tower.encoder.layers.1", "vision"),
        ("visual.merger.mlp.0", "vision"), ("model.multi_modal_projector.linear_1", "connector"),
        ("thinker.audio_tower.layers.0", "audio"), ("mtp.layers.0.self_attn.q_proj", "prediction"),
        ("model.mtp_layers.0", "prediction"), ("model.connector.modality_projection.proj", "connector"),
    ],
)  # fmt: skip
def test_the_part_of_a_model_that_a_name_belongs_to(name: str, part: str) -> None:
    assert part_of(name) == part


TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
NO_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}


def gemma3(t: Any) -> Any:
    text = TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 8}
    config = t.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return t.Gemma3ForConditionalGeneration(config)


def llava(t: Any) -> Any:
    vision = t.CLIPVisionConfig(**VISION, projection_dim=16)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=vision))


def mistral3(t: Any) -> Any:
    vision = t.PixtralVisionConfig(**VISION, head_dim=8)
    config = t.Mistral3Config(text_config=t.MistralConfig(**TEXT), vision_config=vision)
    return t.Mistral3ForConditionalGeneration(config)


def qwen2_5_vl(t: Any) -> Any:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
        "patch_size": 14, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(text_config=NO_HEAD_DIM | MROPE, vision_config=vision)
    )


def mllama(t: Any) -> Any:
    text = TEXT | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}, "pad_token_id": 0}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
        "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
    }  # fmt: skip
    return t.MllamaForConditionalGeneration(t.MllamaConfig(text_config=text, vision_config=vision))


def idefics3(t: Any) -> Any:
    config = t.Idefics3Config(text_config=t.LlamaConfig(**TEXT), vision_config=VISION)
    return t.Idefics3ForConditionalGeneration(config)


def qwen2_audio(t: Any) -> Any:
    audio = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 10,
    }  # fmt: skip
    config = t.Qwen2AudioConfig(text_config=t.Qwen2Config(**NO_HEAD_DIM), audio_config=audio)
    return t.Qwen2AudioForConditionalGeneration(config)


FAMILIES = [gemma3, llava, mistral3, qwen2_5_vl, mllama, idefics3, qwen2_audio]


@pytest.mark.parametrize("make", FAMILIES)
def test_names_of_a_running_model_read_as_transformers_saves_them(make: Callable[[Any], Any], tmp_path: Path) -> None:
    """Towers and language model have layers of equal shapes here, so that shapes alone tell nothing."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = make(transformers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    logging.disable(logging.NOTSET)
    stored, running = load_file(tmp_path / "model.safetensors"), model.state_dict()
    names = exchange({n: tuple(t.shape) for n, t in running.items()}, {n: tuple(t.shape) for n, t in stored.items()})
    assert not names.ambiguous
    seen = set()
    for name, tensor in running.items():
        ours = names.ours(name)
        if ours not in stored:
            assert name == "lm_head.weight"  # which is tied
            continue
        assert torch.equal(stored[ours], tensor), name
        assert names.theirs(ours) == name
        seen.add(ours)
    assert seen == stored.keys()


def test_two_stacks_that_fit_equally_well_are_refused_with_both_readings(world: Any) -> None:
    tensors = world.llama()
    twice = {f"{side}.{n}": t.clone() for side in ("left", "right") for n, t in tensors.items()}
    aligned, other = world.checkpoint("aligned", twice), world.checkpoint("other", tensors)
    with pytest.raises(RequestError) as refused:
        in_names_of(opened(aligned), opened(other))
    [offence] = refused.value.offences
    assert offence.what == "model.layers"
    assert offence.got == "left.model.layers or right.model.layers, which fit equally well"


def test_two_of_theirs_never_stand_for_one_of_ours(world: Any) -> None:
    tensors = world.llama()
    twice = {f"{side}.{n}": t.clone() for side in ("left", "right") for n, t in tensors.items()}
    aligned, other = world.checkpoint("aligned", tensors), world.checkpoint("other", twice)
    with pytest.raises(RequestError) as refused:
        in_names_of(opened(aligned), opened(other))
    assert [(o.what, o.got) for o in refused.value.offences] == [
        (f"{side}.model.layers", "model.layers, as others do") for side in ("left", "right")
    ]


def test_shapes_tell_two_stacks_apart(world: Any) -> None:
    """A talker beside a thinker: the same words in the path, other widths."""
    thinker = world.llama()
    world.sizes = {"hidden": 12, "kv": 12, "inner": 20}
    small = world.llama()
    both = {f"one.{n}": t for n, t in small.items()} | {f"two.{n}": t for n, t in thinker.items()}
    names = exchange({n: tuple(t.shape) for n, t in thinker.items()}, {n: tuple(t.shape) for n, t in both.items()})
    assert {names.ours(n) for n in thinker} == {f"two.{n}" for n in thinker}


NAMES = [f"model.layers.{i}.self_attn.{m}.weight" for i in range(4) for m in ("q_proj", "k_proj", "v_proj", "k_norm")]
SHARED = [name for name in NAMES if name.split(".")[2] in "23" and "q_proj" not in name]


def test_layers_that_share_keys_and_values_may_lack_them() -> None:
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    rest = [name for name in NAMES if name not in SHARED]
    assert set(excused(NAMES, rest, config, {})) == set(SHARED)
    assert set(excused(NAMES, rest, {"text_config": config}, {})) == set(SHARED)
    assert not excused(NAMES, rest, {"num_hidden_layers": 4}, {})
    assert "model.layers.1.self_attn.k_proj.weight" not in excused(NAMES, rest[:5], config, {})


def test_what_is_there_in_part_was_lost() -> None:
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    some = [name for name in NAMES if name != "model.layers.3.self_attn.k_proj.weight"]
    assert not excused(NAMES, some, config, {})
    mtp = ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight"]
    assert set(excused([*NAMES, *mtp], NAMES, config, {})) == set(mtp)
    assert not excused([*NAMES, *mtp], [*NAMES, mtp[0]], config, {})


def test_layers_beyond_the_model_may_lack_and_no_others() -> None:
    beyond = [
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.4.embed_tokens.weight",
        "model.layers.4.eh_proj.weight",
    ]
    assert set(excused([*NAMES, *beyond], NAMES, {"num_hidden_layers": 4}, {})) == set(beyond)
    assert not excused([*NAMES, *beyond], NAMES, {"num_hidden_layers": 5}, {})
    tower = "vision_tower.encoder.layers.9.mlp.fc1.weight"
    assert not excused([*NAMES, tower], NAMES, {"num_hidden_layers": 4}, {})


def test_a_part_may_lack_where_the_configuration_has_no_word_of_it() -> None:
    ours = [*NAMES, "lm_head.weight", "vision_tower.blocks.0.fc1.weight", "multi_modal_projector.linear_1.weight"]
    multimodal, text = {"vision_config": {}, "text_config": {"num_hidden_layers": 4}}, {"model_type": "x_text"}
    parts = set(ours[-2:])
    assert set(excused(ours, [*NAMES, "lm_head.weight"], multimodal, text)) == parts
    assert set(excused(ours, NAMES, multimodal, text)) == parts  # a lost head stays one
    assert not excused(ours, NAMES, multimodal, multimodal)  # a lost file
    assert not excused(ours, NAMES, multimodal, {})  # nothing says so
    half = "vision_tower.blocks.1.fc1.weight"
    assert set(excused([*ours, half], [*NAMES, half], multimodal, text)) == {ours[-1]}
