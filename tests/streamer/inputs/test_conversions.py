"""Names inside of layers: our table against transformers' own, and what is stored against what a model calls it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safeshard.streamer.inputs.names import conversions
from safeshard.streamer.inputs.names.conversions import OWN, TABLE
from safeshard.streamer.inputs.names.convert import ConvertedNames, match_names

transformers = pytest.importorskip("transformers")
mapping = pytest.importorskip("transformers.conversion_mapping")

NAMES = (
    "transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.11.attn.attention.out_proj.weight",
    "transformer.h.0.mlp.c_fc_0.weight", "transformer.h.0.mlp.c_proj.weight", "model.word_embeddings.weight",
    "model.layers.3.attention.dense.weight", "model.layers.3.attention.query_layernorm.weight",
    "model.layers.3.self_attn.gate_proj.weight", "model.layers.3.mlp.gate_proj.weight",
    "model.layers.3.self_attn.f_a_proj.weight", "model.layers.3.self_attn.A_log",
    "model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.self_attn.o_proj.weight", "lm_head.weight",
)  # fmt: skip


@pytest.mark.parametrize("family", [family for family in TABLE if family not in (OWN, "yi")])
def test_the_table_says_what_transformers_says(family: str) -> None:
    if mapping.get_checkpoint_conversion_mapping(family) is None:
        pytest.skip("this transformers does not know the family")
    ours, theirs = conversions._of_table(family), conversions._of_transformers(family)
    assert ours is not None
    assert theirs is not None
    for name in NAMES:
        assert ours.forward(name) == theirs.forward(name), name
        assert ours.forward(ours.forward(name)) == ours.forward(name)


@pytest.mark.parametrize("family", TABLE)
def test_names_go_there_and_back(family: str) -> None:
    conversion = conversions._of_table(family)
    assert conversion is not None
    moved = 0
    for name in NAMES:
        new = conversion.forward(name)
        moved += new != name and conversion.backward(new) == name
        assert conversion.forward(conversion.backward(new)) == new
    assert moved or family in (OWN, "yi")


def test_without_transformers_the_table_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise ImportError

    conversions._of_transformers.cache_clear()
    monkeypatch.setattr(conversions, "require_transformers", none)
    theirs = {"transformer.h.0.attn.attention.q_proj.weight": (4, 4)}
    ours = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
    assert match_names(theirs, ours, ["exaone"]).ours(next(iter(theirs))) == next(iter(ours))
    assert not isinstance(match_names(theirs, ours, ["hy_v4"]), ConvertedNames)
    conversions._of_transformers.cache_clear()


def test_what_the_table_does_not_know_comes_from_transformers() -> None:
    theirs = {
        f"model.layers.{i}.{n}.weight": (4, 4) for i in range(2) for n in ("self_attn.linear_gate", "mlp.up_proj")
    }
    ours = {n.replace("linear_gate", "gate_proj"): shape for n, shape in theirs.items()}
    if mapping.get_checkpoint_conversion_mapping("hy_v4") is None:
        pytest.skip("this transformers does not know the family")
    names = match_names(theirs, ours, ["hy_v4"])
    assert {names.ours(name) for name in theirs} == ours.keys()
    assert "'self_attn.linear_gate' read as 'self_attn.gate_proj'" in str(names)
    assert names.theirs("model.layers.7.self_attn.gate_proj.weight") == "model.layers.7.self_attn.linear_gate.weight"


@pytest.mark.parametrize("family", ["exaone", "lfm3", "phimoe"])
def test_what_transformers_saves_reads_as_what_it_runs(family: str, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 2, "num_experts": 2, "pad_token_id": 0,
        "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    try:
        config = transformers.AutoConfig.for_model(family, **sizes)  # what a family does not know it keeps
        model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        pytest.skip("this transformers does not build the family")
    model.save_pretrained(tmp_path)
    stored = {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    running = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert any(name not in stored for name in running)
    names = match_names(running, stored, [family])
    for name, shape in running.items():
        if not re.search(r"\.experts\.", name):
            assert stored[names.ours(name)] == shape, name
            assert names.theirs(names.ours(name)) == name
