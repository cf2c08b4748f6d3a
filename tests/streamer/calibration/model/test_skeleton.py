"""What a model must be to run layer by layer, and what is refused, by name."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from safeshard.manifests.errors import RequestError
from safeshard.streamer.calibration.model.experts import find_experts
from safeshard.streamer.calibration.model.skeleton import Skeleton

LLAMA = Path(__file__).parents[3] / "goldens/llama/aligned"
CPU = torch.device("cpu")


def build(folder, names):
    return Skeleton(folder, names, torch.float32)


@pytest.fixture
def weights():
    return load_file(LLAMA / "model.safetensors")


class OldConfig(transformers.PretrainedConfig):
    model_type = "safeshard_test"

    def __init__(self, style="plain", **kwargs):
        self.style, self.num_hidden_layers, self.hidden_size, self.vocab_size = style, 3, 8, 97
        super().__init__(**kwargs)


class OldLayer(nn.Module):
    """A layer as in old transformers releases: it returns a tuple."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return (hidden_states + torch.tanh(self.fc(hidden_states)),)


class OldModel(transformers.PreTrainedModel):
    """A base model that is its own head, and whose forward depends on `style`."""

    config_class = OldConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(97, 8)
        self.blocks = nn.ModuleList(OldLayer() for _ in range(3))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embed(input_ids)
        layers = {"skips": self.blocks[1:], "reversed": self.blocks[::-1]}.get(self.config.style, self.blocks)
        for layer in layers:
            hidden = layer(hidden_states=hidden)[0]
            if self.config.style == "scales":
                hidden = hidden * 2
        return hidden


@pytest.fixture(scope="module")
def old_model(tmp_path_factory):
    """style -> (model, its skeleton, its weights)."""
    AutoConfig.register("safeshard_test", OldConfig)
    AutoModelForCausalLM.register(OldConfig, OldModel)

    def make(style="plain"):
        folder = tmp_path_factory.mktemp(style)
        torch.manual_seed(0)
        model = OldModel(OldConfig(style)).eval()
        model.config.save_pretrained(folder)
        return model, build(folder, model.state_dict()), model.state_dict()

    return make


@torch.no_grad()
def test_layers_that_return_tuples(old_model):
    model, skeleton, weights = old_model()
    tokens = torch.tensor([[1, 2, 96], [4, 4, 0]])
    with skeleton.filled(None, weights.__getitem__, CPU):
        hidden, calls = skeleton.record(tokens, torch.ones_like(tokens))
    for (path, layer), call in zip(skeleton.layers.items(), calls, strict=True):
        with skeleton.filled(path, weights.__getitem__, CPU):
            hidden = call.run(layer, hidden)
    assert torch.equal(hidden, model(tokens))


@pytest.mark.parametrize("style", ["scales", "skips", "reversed"])
def test_a_forward_that_does_more_between_layers_is_refused(old_model, style):
    _, skeleton, weights = old_model(style)
    tokens = torch.tensor([[1, 2, 96], [4, 4, 0]])
    with (
        pytest.raises(RequestError, match="layers that"),
        skeleton.filled(None, weights.__getitem__, CPU),
    ):
        skeleton.record(tokens, torch.ones_like(tokens))


def test_weights_are_there_only_while_filled(weights):
    skeleton = build(LLAMA, weights)
    path, layer = next(iter(skeleton.layers.items()))
    with skeleton.filled(path, weights.__getitem__, CPU):
        for name, linear in skeleton.linears(path).items():
            assert torch.equal(linear.weight, weights[f"{name}.weight"].float())
    with pytest.raises(KeyError), skeleton.filled(path, {}.__getitem__, CPU):
        pass
    assert all(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_of_an_unknown_kind_are_refused_by_their_place(old_model, stacked):
    model, _, _ = old_model()
    if stacked:
        model.config.num_experts = 4
        model.blocks[1].up = nn.Parameter(torch.zeros(4, 8, 8))
    else:
        model.blocks[1].experts = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(RequestError, match=r"experts that no code here runs: blocks\.1"):
        find_experts(LLAMA, model.config, {f"blocks.{i}": layer for i, layer in enumerate(model.blocks)})


def test_parameters_with_three_axes_are_no_experts_by_themselves(old_model):
    """As RWKV, XLNet and RecurrentGemma have them."""
    model, _, _ = old_model()
    model.blocks[1].up = nn.Parameter(torch.zeros(4, 8, 8))
    assert not find_experts(LLAMA, model.config, {f"blocks.{i}": layer for i, layer in enumerate(model.blocks)})


def test_fused_experts_are_never_allocated(tmp_path):
    """Sixteen layers of 4096 experts, which take 4 TB: as much as no machine gives, even unwritten."""
    sizes = {"hidden_size": 4096, "moe_intermediate_size": 4096, "num_experts": 4096, "num_hidden_layers": 16}
    small = {"vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    AutoConfig.for_model("qwen3_moe", **sizes | small).save_pretrained(tmp_path)
    names = [f"model.layers.{layer}.x.weight" for layer in range(16)]
    with pytest.raises(RequestError) as caught:
        build(tmp_path, names)
    missing = {offence.what for offence in caught.value.offences}
    assert "model.layers.3.mlp.gate.weight" in missing  # of the experts it asks elsewhere
    assert not any(".experts." in name for name in missing)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "configuration"),
        ("[]", "configuration"),
        ('{"model_type": "no_such_model"}', "configuration"),
        ('{"model_type": "new", "auto_map": {"AutoConfig": "evil.C"}}', "configuration"),
        ('{"model_type": "clip"}', "causal language model"),
        ('{"model_type": "t5"}', "encoder-decoder"),
    ],
)
def test_other_models_are_refused(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(RequestError, match=reason):
        build(tmp_path, [])


def test_missing_tensors_are_all_listed(weights):
    lost = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    with pytest.raises(RequestError) as caught:
        build(LLAMA, weights.keys() - lost)
    assert [offence.what for offence in caught.value.offences] == lost


def test_a_bias_that_config_json_switches_off_is_refused(weights):
    with pytest.raises(RequestError, match=r"layers\.2\.self_attn\.q_proj\.bias"):
        build(LLAMA, [*weights, "model.layers.2.self_attn.q_proj.bias"])


def test_another_shape_is_refused(weights):
    weights["model.embed_tokens.weight"] = torch.zeros(260, 64)
    skeleton = build(LLAMA, weights)
    with (
        pytest.raises(RequestError, match="expected 256 x 64, got 260 x 64"),
        skeleton.filled(None, weights.__getitem__, CPU),
    ):
        pass


def test_without_transformers_the_extra_is_named(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match=r"safeshard\[calibration\]"):
        build(LLAMA, weights)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "qwen2", "num_hidden_layers": 10**12}, "num_hidden_layers"),  # it would list each layer's kind
        ({"model_type": "gpt2", "n_layer": 3}, "n_layer"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**12}}, "num_hidden_layers"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 10**12}, "num_experts"),
    ],
)
def test_counts_that_the_checkpoint_does_not_bear_out_are_refused_unbuilt(tmp_path, config, key):
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    with pytest.raises(RequestError, match=key):
        Skeleton(tmp_path, names, torch.float32)
