"""Patterns from files: they match what `re` matches, and come to an end."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.manifests.errors import RequestError
from safeshard.streamer.inputs.lora_config import read_config
from safeshard.streamer.inputs.names import patterns
from safeshard.streamer.inputs.names.patterns import Patterns

NAMES = [
    f"{prefix}layers.{layer}.{module}"
    for prefix in ("model.", "", "model.language_model.", "visual.")
    for layer in (0, 7, 10)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.1.up_proj", "mlp.down_proj", "q_proj.x")
] + ["lm_head", "model.embed_tokens", "q_proj", "not_q_proj", "a\nq_proj", "É.q_proj", "Q_PROJ", ""]
USUAL = [
    r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", r".*(q|v)_proj$", r"^(?!.*visual).*(?:q_proj|v_proj).*$", ".*_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\..*)",
    r"model\.layers\.([0-9]|1[0-5])\.mlp\.(gate|up|down)_proj", r"(.*\.)?(q_proj)$", r"(^|.*\.)lm_head($|\..*)",
    r"(?:^|.*?\.)layers\.(?P<layer>\d{1,9})\.", r".*?\.[^.]*\.(?P<layer>\d{1,9})\.", r"(?i).*q_PROJ", r"\w+",
    r"[\w.]+", r"(?s:.*)q_proj", r"(?<!not_)q_proj", r".*(?<!visual)\.layers\.0\..*", r"(a)?(?(1)\nq|.*)_proj",
    r"[^\W\d_]+\.q_proj",
]  # fmt: skip
PIECES = [
    "model", r"\.", ".", ".*", ".*?", r"\d+", r"\d{1,2}", "(?:self_attn|mlp)", "(q|v|up)_proj", "[qv]_proj", "^", "$",
    "(?!.*visual)", "layers", "[^.]*", r"\b", r"\w+?", "(?:", ")", "|", "+", "{2}", "(?i:Q)", r"(\w)\1", "É", r"\Z",
    "[a",
]  # fmt: skip


def check_against_re(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = re.compile(text)
        except re.error:
            with pytest.raises(re.error):
                Patterns("x").compile(text)
            return
        ours = Patterns("x").compile(text)
    for name in NAMES:
        for kind in ("match", "fullmatch"):
            expected, got = getattr(theirs, kind)(name), getattr(ours, kind)(name)
            assert (expected and (expected.span(), expected.groupdict())) == (got and (got.span(), got.groupdict()))


@pytest.mark.parametrize("text", USUAL)
def test_usual_patterns_mean_what_they_mean_to_re(text: str) -> None:
    check_against_re(text)


@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_any_pattern_means_what_it_means_to_re(text: str) -> None:
    check_against_re(text)


HANGING = r"(?:(?:[a-z]|\w|\.)+)+[!?]"


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": HANGING},
        {"exclude_modules": HANGING},
        {"modules_to_save": [HANGING]},
        {"layers_pattern": HANGING, "layers_to_transform": [0]},
    ],
)
def test_a_pattern_that_runs_on_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.2)
    config = read_config("c", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]} | change)
    for name in (f"model.layers.0.{'a' * 40}.q_proj", "x.q_proj"):  # once the time is up, no other name gets any
        with pytest.raises(RequestError, match=r"c: .*within 0\.2 s, got one that takes longer"):
            config.targets(name)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_rank_pattern_that_runs_on_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.2)
    config: Any = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], key: {HANGING: 2}}
    read = read_config("c", config)
    with pytest.raises(RequestError, match="takes longer"):
        read.scaling("a" * 60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a" * 70_000, "at most 65536 characters"), ("a{e<9}", "fuzzy"), ("[[:alpha:]]", "POSIX")],
)
def test_what_is_refused_unread(text: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        Patterns("x").compile(text)


def test_time_to_compile_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.05)
    many: Any = {f"x{number}": 1 for number in range(1_000_000)}
    with pytest.raises(RequestError, match="takes longer"):
        read_config("c", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], "rank_pattern": many})
