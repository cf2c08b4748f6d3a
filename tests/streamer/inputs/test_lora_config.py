"""The meaning of adapter_config.json, against PEFT's own matching functions."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.lora_config import LoraConfig, read_config

MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
MODULES = [
    f"{prefix}layers.{layer}.{module}"
    for prefix in ("model.", "")
    for layer in (0, 1, 10)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.1.up_proj", "mlp.up_proj")
] + ["lm_head", "model.h.2.q_proj", "q_proj", "not_q_proj"]


def config(**changes: Any) -> LoraConfig:
    return read_config("adapter_config.json", MINIMAL | changes)


def refused(raw: Any) -> tuple[Offence, ...]:
    with pytest.raises(RequestError) as caught:
        read_config("adapter_config.json", raw)
    return caught.value.offences


def as_saved(value: Any) -> Any:
    """A default as PEFT writes it into JSON."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


@pytest.mark.parametrize("field", dataclasses.fields(PeftLoraConfig), ids=lambda field: field.name)
def test_peft_s_default_of_every_key_is_accepted(field: dataclasses.Field[Any]) -> None:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    read = config(**{field.name: MINIMAL.get(field.name, as_saved(default))})
    assert (read.rank("a.q_proj"), read.scaling("a.q_proj")) == (8, 2.0)
    assert read.targets("a.q_proj") is True


def test_a_config_that_peft_saves_is_accepted(tmp_path: Any) -> None:
    given = PeftLoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    given.save_pretrained(tmp_path)
    read = read_config("c", json.loads((tmp_path / "adapter_config.json").read_text()))
    assert (read.rank("q_proj"), read.scaling("q_proj")) == (3, 5 / math.sqrt(3))


def test_files_of_old_releases_lack_keys() -> None:
    old = {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16,
           "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 8,
           "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
    assert read_config("c", old).scaling("model.q_proj") == 2.0


PATTERNS = st.sampled_from([
    "q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", "^model.layers.0.self_attn.q_proj", "layers.1.*",
    r"model\.layers\.(0|10)\..*up_proj", ".*", "up_proj|v_proj", r"\d+.self_attn.v_proj", "^layers.10.mlp.up_proj",
])  # fmt: skip


@given(
    st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4), st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4)
)
@settings(deadline=None, max_examples=100)
def test_patterns_mean_what_peft_takes_them_for(ranks: dict[str, int], alphas: dict[str, int]) -> None:
    for rslora in (False, True):
        read = config(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
        for module in MODULES:
            rank = ranks.get(get_pattern_key(list(ranks), module), 8)
            alpha = alphas.get(get_pattern_key(list(alphas), module), 16)
            assert read.rank(module) == rank
            assert read.scaling(module) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


NAMES = st.sampled_from(["q_proj", "v_proj", "self_attn.v_proj", "model.layers.1.mlp.up_proj", "lm_head", "1"])
TARGETS = st.one_of(st.lists(NAMES, max_size=3), PATTERNS)


@given(
    target=TARGETS,
    exclude=st.one_of(st.none(), TARGETS),
    saved=st.one_of(st.none(), st.lists(NAMES, max_size=2)),
    layers=st.one_of(st.none(), st.sampled_from([0, 1]), st.lists(st.sampled_from([0, 1, 2, 10]), max_size=3)),
    pattern=st.sampled_from([None, [], "", "layers", "h", ["layers", "h"], "experts"]),
)
@settings(deadline=None, max_examples=300)
def test_targets_are_those_of_peft(target: Any, exclude: Any, saved: Any, layers: Any, pattern: Any) -> None:
    raw: dict[str, Any] = {"target_modules": target, "exclude_modules": exclude, "modules_to_save": saved}
    if isinstance(target, list):
        raw |= {"layers_to_transform": layers, "layers_pattern": pattern if layers is not None else None}
    theirs, read = PeftLoraConfig(**raw), config(**raw)
    for module in MODULES:
        assert read.targets(module) is bool(check_target_module_exists(theirs, module)), module


def test_all_linear_says_nothing_but_what_it_leaves_out() -> None:
    read = config(target_modules="All-Linear", exclude_modules=["v_proj"], modules_to_save=["lm_head"])
    assert [read.targets(name) for name in ("a.q_proj", "a.v_proj", "lm_head")] == [None, False, False]


def test_everything_unsupported_is_named_at_once() -> None:
    wrong = {
        "use_dora": True, "lora_bias": True, "bias": "lora_only", "alora_invocation_tokens": [1],
        "kasa_config": {"a": 1}, "trainable_token_indices": [3], "target_parameters": "experts.w",
        "use_qalora": True, "layer_replication": [[0, 1]], "megatron_config": {"a": 1}, "arrow_config": {"a": 1},
        "use_bdlora": {"a": 1}, "velora_config": {"a": 1}, "monteclora_config": {"a": 1}, "a_key_of_next_year": 0.5,
        "init_lora_weights": "pissa",
    }  # fmt: skip
    offences = refused(MINIMAL | wrong)
    assert {offence.what for offence in offences} == wrong.keys()
    assert {offence.where for offence in offences} == {"adapter_config.json"}
    assert "--finetuned" in offences[0].remedy


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "loftq", "corda", "lora_ga", "", "new", 3]
)
def test_initialisations_that_change_the_base_are_refused(init: Any) -> None:
    (offence,) = refused(MINIMAL | {"init_lora_weights": init})
    assert (offence.what, offence.got) == ("init_lora_weights", repr(init))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base_are_accepted(init: Any) -> None:
    assert config(init_lora_weights=init).rank("q_proj") == 8


def test_the_config_of_another_initialisation_is_ignored_as_peft_does() -> None:
    unused = {
        "eva_config": {"rho": 2.0},
        "corda_config": {"x": 1},
        "lora_ga_config": {"x": 1},
        "loftq_config": {"x": 1},
    }
    assert config(**unused).scaling("q_proj") == 2.0


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_what_learns_a_prompt_has_nothing_to_merge(kind: str) -> None:
    (offence,) = refused({"peft_type": kind})
    assert "merge" not in offence.remedy
    assert "there is no delta" in offence.remedy


@pytest.mark.parametrize("kind", ["VERA", "IA3", "ADALORA", "LOHA", "lora", None, 3, [], {}])
def test_other_peft_types_are_refused(kind: Any) -> None:
    (offence,) = refused({"peft_type": kind, "r": None, "d_initial": 0.1})
    assert (offence.what, offence.expected, offence.got) == ("peft_type", "LORA", repr(kind))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", [0, -1, 2.0, "8", True, None, 10**30]),
        ("lora_alpha", ["16", None, True, math.nan, math.inf, 10**400]),
        ("rank_pattern", [[], "x", {"q": 0}, {"q": 1.5}, {"q": None}]),
        ("alpha_pattern", [[], {"q": math.inf}, {"q": 10**400}, {"q": "1"}]),
        ("target_modules", [None, 3, [3], {"q_proj": 1}]),
        ("exclude_modules", [3, [None]]),
        ("modules_to_save", ["lm_head", [1], {"a": 1}]),
        ("layers_to_transform", ["1", [1.5], ["1"], True, [True]]),
        ("layers_pattern", [3, [3]]),
        ("use_rslora", [1, "yes"]),
    ],
)
def test_values_of_another_type_are_refused(key: str, values: list[Any]) -> None:
    for value in values:
        assert [offence.what for offence in refused(MINIMAL | {key: value})] == [key], value


@pytest.mark.parametrize("raw", [None, [], "x", 3])
def test_what_is_no_object_is_refused(raw: Any) -> None:
    assert refused(raw)[0].expected == "a JSON object"


HOSTILE = ["(", "[", "a{99999999999}", "(" * 5000 + ")" * 5000, "(?P<layer>x)(?P<layer>y)", "(?P=gone)"]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "layers_pattern"]
)
def test_malformed_regular_expressions_are_refused(key: str, pattern: str) -> None:
    values = {"rank_pattern": {pattern: 1}, "alpha_pattern": {pattern: 1}, "modules_to_save": [pattern]}
    (offence,) = refused(MINIMAL | {key: values.get(key, pattern)})
    assert offence.expected == "valid regular expressions"


@given(st.text(max_size=8))
@settings(deadline=None, max_examples=200)
def test_any_text_as_a_pattern_is_read_or_refused(text: str) -> None:
    raw = {"rank_pattern": {text: 3}, "target_modules": text, "modules_to_save": [text], "layers_pattern": text}
    try:
        read = config(**raw)
    except RequestError:
        return
    for module in MODULES:
        assert read.rank(module) in (3, 8)
        assert read.targets(module) in (True, False)


def test_an_absurd_layer_number_is_no_layer() -> None:
    assert config(layers_to_transform=[1]).targets(f"model.layers.{'9' * 5000}.q_proj") is False
