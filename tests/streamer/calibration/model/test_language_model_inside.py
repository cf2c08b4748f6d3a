"""The language model inside a multimodal one, against the whole model that transformers runs on the same text."""

import contextlib
import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from safeshard.manifests.errors import RequestError
from safeshard.streamer.calibration.forward import calibrate
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.calibration.model.skeleton import Skeleton
from safeshard.streamer.cli.app import main

CPU = torch.device("cpu")
LAYERS, VOCABULARY = 4, 64
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_SEES = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}


def gemma3():
    text = TEXT | ALTERNATING | {"query_pre_attn_scalar": 8}
    ids = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    return tf.Gemma3Config(text_config=text, vision_config=SEES, mm_tokens_per_image=4, **ids)


def gemma3n():
    text = TEXT | ALTERNATING | {
        "intermediate_size": [48] * LAYERS, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    }  # fmt: skip
    audio = {
        "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "input_feat_size": 16,
        "sscp_conv_channel_size": (4, 4), "vocab_size": 8, "vocab_offset": 72,
    }  # fmt: skip
    sees = {"hidden_size": 16, "vocab_size": 8, "vocab_offset": 64, "model_args": {"channel_multiplier": 0.1}}
    return tf.Gemma3nConfig(text_config=text, vision_config=sees, audio_config=audio)


def gemma4(shared=0, per_layer=0):
    text = TEXT | ALTERNATING | {
        "global_head_dim": 16, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": per_layer,
        "num_kv_shared_layers": shared,
    }  # fmt: skip
    sees = {key: SEES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    return tf.Gemma4Config(
        text_config=text, vision_config=sees | {"head_dim": 8, "num_key_value_heads": 2}, audio_config=None
    )


def qwen2_5_vl():
    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"rope_parameters": MROPE}
    sees = QWEN_SEES | {"patch_size": 14, "fullatt_block_indexes": [1]}
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=sees, **QWEN_IDS)


def qwen3_vl():
    sees = QWEN_SEES | {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    rope = MROPE | {"mrope_interleaved": True}
    return tf.Qwen3VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=sees, **QWEN_IDS)


def qwen3_5():
    text = TEXT | {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_num_value_heads": 4, "linear_value_head_dim": 8,
        "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
    }  # fmt: skip
    sees = QWEN_SEES | {"patch_size": 14, "num_position_embeddings": 16}
    return tf.Qwen3_5Config(text_config=text, vision_config=sees, **QWEN_IDS)


def mistral3():
    sees = tf.PixtralVisionConfig(**SEES, head_dim=8)
    return tf.Mistral3Config(text_config=tf.MistralConfig(**TEXT), vision_config=sees, image_token_index=60)


def llava():
    sees = tf.CLIPVisionConfig(**SEES)
    return tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=sees, image_token_index=60)


def idefics3():
    return tf.Idefics3Config(text_config=tf.LlamaConfig(**TEXT), vision_config=SEES, image_token_id=60, pad_token_id=0)


def smolvlm():
    return tf.SmolVLMConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=SEES, image_token_id=60, pad_token_id=0)


def llama4():
    text = TEXT | {
        "intermediate_size_mlp": 48, "moe_layers": [], "attention_chunk_size": 8, "num_local_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    sees = SEES | {
        "intermediate_size": 64,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "vision_output_dim": 16,
    }
    return tf.Llama4Config(text_config=text, vision_config=sees)


def phi4_multimodal():
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    hears = {
        "hidden_size": 16, "intermediate_size": 24, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 16,
        "nemo_conv_channels": 16, "input_size": 16, "depthwise_separable_out_channel": 16,
    }  # fmt: skip
    sees = SEES | {"crop_size": 28, "image_token_id": 60, "feature_layer": -2}
    return tf.Phi4MultimodalConfig(**text, vision_config=sees, audio_config=hears | {"audio_token_id": 61})


FAMILIES = {
    "gemma3": gemma3, "gemma3n": gemma3n, "gemma4": gemma4, "gemma4_e2b": lambda: gemma4(2, 6),
    "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "qwen3_5": qwen3_5, "mistral3": mistral3, "llava": llava,
    "idefics3": idefics3, "smolvlm": smolvlm, "llama4": llama4, "phi4_multimodal": phi4_multimodal,
}  # fmt: skip


def whole(config, folder, monkeypatch):
    """The whole multimodal model, saved as releases are."""
    if isinstance(config, tf.Gemma3nConfig):  # its vision tower is timm's, which text does not need
        build = tf.AutoModel.from_config
        sees = type(config.vision_config)
        monkeypatch.setattr(
            tf.AutoModel, "from_config", lambda c, **o: nn.Linear(2, 2) if isinstance(c, sees) else build(c, **o)
        )
    kind = tf.AutoModelForCausalLM if isinstance(config, tf.Phi4MultimodalConfig) else tf.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: at their initial values they would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def samples(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 58, (length,), generator=generator).tolist() for length in lengths]


def language_model(model):
    """The decoder layers inside the whole model, in order."""
    stacks = [m for _, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    (layers,) = [s for s in stacks if hasattr(s[0], "self_attn") or hasattr(s[0], "linear_attn")]
    return layers


def run(folder, weights, tokens, **options):
    options = {"budget_bytes": 1 << 30, "key": "a", "saved": HiddenStates([folder])} | options
    layers = calibrate(folder, weights.__getitem__, weights.keys(), tokens, device=CPU, dtype=torch.float32, **options)
    return {name: gram for layer in layers for name, gram in layer.grams.items()}


def heard(model, **inputs):
    """Run the whole model for its hooks. Llama 4 of transformers 5.24 fails without images, after its last layer."""
    with contextlib.suppress(AttributeError) if model.config.model_type == "llama4" else contextlib.nullcontext():
        model(**inputs, use_cache=False)


def padded(tokens):
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(tokens):
        ids[row, : len(sample)], mask[row, : len(sample)] = torch.tensor(sample), 1
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_models_hidden_states_and_grams(family, tmp_path, monkeypatch):
    """Hidden states of every layer, and Grams of every linear, of the whole model on the same text."""
    model = whole(FAMILIES[family](), tmp_path, monkeypatch)
    monkeypatch.undo()
    weights = load_file(tmp_path / "model.safetensors")
    tokens = samples([13, 6, 9])
    ids, mask = padded(tokens)
    skeleton = Skeleton(tmp_path, weights.keys(), torch.float32)
    assert not any(word in name for name in skeleton.shapes() for word in ("vision", "visual", "audio", "image"))

    own, grams, handles = [], {}, []
    for layer in language_model(model):
        handles.append(layer.register_forward_hook(lambda *a: own.append(a[2][0] if isinstance(a[2], tuple) else a[2])))
        grams |= {module: 0 for module in layer.modules() if isinstance(module, nn.Linear)}
    for module in grams:
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args: grams.__setitem__(
                    m, grams[m] + args[0].flatten(0, -2).double().T @ args[0].flatten(0, -2).double()
                )
            )
        )
    with torch.no_grad():
        for sample in tokens:  # one by one, so without padding
            heard(model, input_ids=torch.tensor([sample]))
        alone, own[:] = own[:], []
        sums = [2 / len(tokens) * gram for gram in grams.values()]
        heard(model, input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()

    states = []
    with torch.no_grad():
        with skeleton.filled(None, weights.__getitem__, CPU):
            hidden, calls = skeleton.record(ids, mask)
        assert hidden.numel() == ids.numel() * skeleton.width
        for (path, layer), call in zip(skeleton.layers.items(), calls, strict=True):
            with skeleton.filled(path, weights.__getitem__, CPU):
                hidden = call.run(layer, hidden)
            states.append(hidden)
    real = mask.bool()
    for ours, theirs in zip(states, own, strict=True):
        assert torch.equal(ours[..., real, :], theirs[..., real, :])
    assert len(alone) == len(tokens) * LAYERS

    made = run(tmp_path, weights, tokens)
    names = [f"{path}.{name}" for path, layer in zip(skeleton.layers, language_model(model), strict=True)
             for name, module in layer.named_modules() if isinstance(module, nn.Linear)]  # fmt: skip
    assert list(made) == names
    assert all(f"{name}.weight" in weights for name in names)
    errors = {n: float((made[n] - s).norm() / s.norm()) for n, s in zip(names, sums, strict=True)}
    assert max(errors.values()) < 1e-5, errors


def test_only_the_language_models_tensors_are_read(tmp_path, monkeypatch):
    """Towers are neither built nor loaded, whatever the prefix that the language model stands under."""
    whole(gemma3(), tmp_path, monkeypatch)
    weights = load_file(tmp_path / "model.safetensors")
    tokens = samples([5, 8])
    expected = run(tmp_path, weights, tokens)
    monkeypatch.setattr(tf.SiglipVisionModel, "__init__", lambda *_: pytest.fail("the vision tower was built"))
    inside = {tail(name): tensor for name, tensor in weights.items() if name.startswith("language_model.model.")}
    for prefix in ("model.language_model.", "language_model.model.", "a.b.", "model.", ""):
        grams = run(tmp_path, {prefix + name: tensor for name, tensor in inside.items()}, tokens)
        assert list(grams) == [prefix + tail(name) for name in expected]
        assert all(torch.equal(*pair) for pair in zip(grams.values(), expected.values(), strict=True))


def tail(name):
    return name.removeprefix("language_model.model.")


def test_two_language_models_are_refused_by_their_paths(tmp_path, monkeypatch):
    whole(gemma3(), tmp_path, monkeypatch)
    names = [
        tail(name) for name in load_file(tmp_path / "model.safetensors") if name.startswith("language_model.model")
    ]
    with pytest.raises(RequestError, match=r"one language model, got tensors of it under 'a\.' or 'b\.'"):
        Skeleton(tmp_path, [f"{path}.{name}" for path in "ab" for name in names], torch.float32)


def test_what_transformers_cannot_build_is_said_in_short(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(RequestError) as caught:
        Skeleton(tmp_path, [], torch.float32)
    assert "CLIP" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_keys_and_values_of_other_layers_hold_back_what_is_saved(tmp_path, monkeypatch):
    """An interrupted run goes on before the layers whose keys and values are shared, and gives the same bytes."""
    whole(gemma4(2, 6), tmp_path, monkeypatch)
    weights, tokens = load_file(tmp_path / "model.safetensors"), samples([5, 8, 8])
    saved = []

    class Saving(HiddenStates):
        def save(self, key, layer, states):
            saved.append((layer, states.clone()))

        def load(self, key, states):
            if saved:
                states.copy_(saved[-1][1])
            return saved[-1][0] if saved else 0

    expected = run(tmp_path, weights, tokens)
    run(tmp_path, weights, tokens, saved=Saving([tmp_path]))
    assert all(layer < 2 for layer, _ in saved)  # the last two take what those before leave
    resumed = run(tmp_path, weights, tokens, saved=Saving([tmp_path]))
    assert all(f".{layer}." in " ".join(resumed) for layer in (2, 3))
    assert all(torch.equal(gram, expected[name]) for name, gram in resumed.items())


@pytest.mark.parametrize("method", ["safedelta", "ridge"])
def test_a_multimodal_model_through_the_command_line(method, tmp_path, monkeypatch, capsys):
    """The language model's linears are treated under their own names; all else stays as the fine-tuned one has it."""
    model = whole(gemma3(), tmp_path / "aligned", monkeypatch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in samples([9, 12, 7, 9])))
    places = {"aligned": "aligned", "finetuned": "tuned", "calibration": "data.jsonl", "output": "out"}
    arguments = [part for option, name in places.items() for part in (f"--{option}", str(tmp_path / name))]
    with pytest.raises(SystemExit) as left:
        main([method, *arguments, "--samples", "4", "--rest", "finetuned"])
    assert not left.value.code, capsys.readouterr().err
    tuned, out = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "out"))
    changed = {name for name in tuned if not torch.equal(tuned[name], out[name])}
    linears = {
        name for name in tuned
        if name.startswith("language_model.model.layers.") and name.endswith("_proj.weight")
    }  # fmt: skip
    assert changed == linears
    assert len(linears) == 7 * LAYERS
