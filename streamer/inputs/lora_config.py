"""What a PEFT adapter_config.json means: rank, scaling and targets of every module; unsupported variants are named.

Follows PEFT's own rules (tuners/lora/model.py, tuners/tuners_utils.py). A key this file does not know is refused unless
it is empty: an adapter from a newer PEFT may use it to change what A and B mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.inputs.names.patterns import Pattern, Patterns

# Keys that this module reads.
CONFIG = "adapter_config.json"
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
    "lora_B_layout", "target_parameters",
}  # fmt: skip
# Keys that say nothing about what A and B mean. The configs of initialisations count only with their own
# init_lora_weights, `ensure_weight_tying` only for embeddings, and transposed weights show in the checkpoint.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) train B A against
# a changed base, so B A is not the delta to the aligned model.
_NEUTRAL_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
_EXPECTED = {
    "use_dora": "plain LoRA: DoRA scales W + B A by its norms, so that its delta is not B A",
    "lora_bias": "plain LoRA: a bias of B is no part of B A",
}
_EMPTY: tuple[object, ...] = (None, False, {}, [], "", 0)
MERGE = (
    'merge it first and give the result as --finetuned: python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')\""
)
_REMEDY = f"{MERGE}; or retrain as plain LoRA"
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
            "CARTRIDGE"}  # fmt: skip
_NO_WEIGHTS = "it learns a prompt and leaves the weights alone, so that there is no delta: fine-tune with LoRA"
# Merging onto the aligned model would be wrong: A and B belong to a base from which their first product was taken.
_CONVERT = (
    "convert it to plain LoRA when it is saved (save_pretrained's path_initial_model_for_weight_conversion), or merge "
    "it into the residual base that it was trained on and give the result as --finetuned"
)

Names = str | Sequence[str] | None


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json, checked. Modules are named as PEFT does: relative to the model that it wrapped.

    Whatever matches a module raises RequestError where a pattern takes too long.
    """

    raw: dict[str, Any]
    where: str = ""

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        return tuple(self.raw.get("modules_to_save") or ())

    @property
    def target_parameters(self) -> tuple[str, ...]:
        return tuple(self.raw.get("target_parameters") or ())

    def targets_parameter(self, name: str) -> bool:
        """Whether the config targets a parameter itself, such as the experts' fused one, by PEFT's rule."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def parameter_or_module(self, module: str) -> str | None:
        """The name that rank and alpha of a module go by if it is targeted, or its weight is; None if neither."""
        if self.targets_parameter(weight := f"{module}.weight"):
            return weight
        return None if self.targets(module) is False else module

    def rank(self, module: str) -> int:
        rank: int = _first(self._ranks, module, self.raw["r"])
        return rank

    def scaling(self, module: str) -> float:
        """delta = scaling * B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        alpha, rank = _first(self._alphas, module, self.raw["lora_alpha"]), self.rank(module)
        return float(alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank)

    def targets(self, module: str) -> bool | None:
        """Whether the config targets a module; None where it says "all-linear", which the config alone cannot tell."""
        if self._excluded(module) or any(pattern.match(module) for pattern in self._saved):
            return False
        target = self.raw.get("target_modules")
        if target is None:
            return False
        if _is_all_linear(target):
            return None
        layers = self.raw.get("layers_to_transform")
        if isinstance(target, str) or module in self._named or layers is None or layers == []:
            return self._targeted(module)
        layers = [layers] if isinstance(layers, int) else layers
        return self._targeted(module) and self._layer(module) in layers

    def compile(self) -> None:
        """Compile every pattern.

        Raises:
            re.error, OverflowError, RecursionError: a pattern is malformed.
            RequestError: a pattern is too long, or compiling them takes too long.
        """
        _ = self._ranks, self._alphas, self._excluded, self._targeted, self._saved, self._layer_patterns

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns(self.where)

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return self._table("rank_pattern")

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return self._table("alpha_pattern")

    def _table(self, key: str) -> list[tuple[Pattern, Any]]:
        table = self.raw.get(key) or {}
        return [(self._patterns.compile(rf"(.*\.)?({name})$"), value) for name, value in table.items()]

    @cached_property
    def _excluded(self) -> Callable[[str], bool]:
        return _matcher(self.raw.get("exclude_modules"), self._patterns)

    @cached_property
    def _targeted(self) -> Callable[[str], bool]:
        target = self.raw.get("target_modules")
        return _matcher(None if _is_all_linear(target) else target, self._patterns)

    @cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(self.raw.get("target_modules") or ())

    @cached_property
    def _saved(self) -> list[Pattern]:
        return [self._patterns.compile(rf"(^|.*\.){name}($|\..*)") for name in self.modules_to_save]

    @cached_property
    def _layer_patterns(self) -> list[Pattern]:
        given = self.raw.get("layers_pattern") or []
        names = [rf"(?:^|.*?\.){name}" for name in ([given] if isinstance(given, str) else given)]
        return [self._patterns.compile(rf"{name}\.(?P<layer>\d{{1,9}})\.") for name in names or [r".*?\.[^.]*"]]

    def _layer(self, module: str) -> int | None:
        match = next((match for pattern in self._layer_patterns if (match := pattern.match(module))), None)
        return int(match["layer"]) if match else None


def read_config(where: str, raw: Any) -> LoraConfig:
    """Read adapter_config.json, given as parsed JSON; `where` names it in errors.

    Raises:
        RequestError: it is malformed or of an unsupported kind; all offenders.
    """
    if not isinstance(raw, dict):
        raise RequestError(Offence(where, "", "a JSON object", type(raw).__name__, "check the file"))
    if raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type")
        remedy = _REMEDY if isinstance(kind, str) else "name the folder of a PEFT adapter"
        remedy = _NO_WEIGHTS if isinstance(kind, str) and kind in _PROMPTS else remedy
        raise RequestError(Offence(where, "peft_type", "LORA", repr(kind), remedy))
    offences = [Offence(where, key, *facts) for key, *facts in _unsupported(raw)]
    malformed = list(_malformed(raw))
    for key in malformed:
        offences.append(Offence(where, key, "what PEFT writes there", repr(raw.get(key)), "correct the file"))
    config = LoraConfig(raw, where)
    if not malformed:
        try:
            config.compile()
        except RequestError as error:
            offences += error.offences
        except (re.error, OverflowError, RecursionError) as error:
            offences.append(Offence(where, "", "valid regular expressions", str(error), "correct the file"))
    if offences:
        raise RequestError(offences)
    return config


def _unsupported(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Keys whose value is not supported: what would be, what it is, and what to do."""
    if (bias := raw.get("bias", "none")) != "none":
        yield "bias", "'none': trained biases are no part of B A", repr(bias), _REMEDY
    if str(init := raw.get("init_lora_weights", True)).lower() not in _NEUTRAL_INITS:
        yield "init_lora_weights", "an initialisation that keeps the base weights", repr(init), _CONVERT
    for key in sorted(raw.keys() - _READ - _NEUTRAL):
        if raw[key] not in _EMPTY:
            expected = _EXPECTED.get(key, "plain LoRA, without it")
            yield key, expected, repr(raw[key]), _REMEDY


def _malformed(raw: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose value is not of the type that PEFT writes."""
    checks: dict[str, Callable[[Any], bool]] = {
        "r": _is_rank,
        "lora_alpha": _is_alpha,
        "rank_pattern": lambda value: value is None or _is_table(value, _is_rank),
        "alpha_pattern": lambda value: value is None or _is_table(value, _is_alpha),
        "target_modules": lambda value: (
            isinstance(value, str) or _is_list(value, str) or (value is None and bool(raw.get("target_parameters")))
        ),
        "target_parameters": lambda value: value is None or _is_list(value, str),
        "lora_B_layout": lambda value: value in (None, "rank_major", "grouped_by_expert"),
        "exclude_modules": lambda value: value is None or isinstance(value, str) or _is_list(value, str),
        "modules_to_save": lambda value: value is None or _is_list(value, str),
        "layers_to_transform": lambda value: value is None or type(value) is int or _is_list(value, int),
        "layers_pattern": lambda value: value is None or isinstance(value, str) or _is_list(value, str),
        "use_rslora": lambda value: value is None or isinstance(value, bool),
    }
    return (key for key, valid in checks.items() if not valid(raw.get(key)))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _is_table(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(valid, value.values()))


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_all_linear(target: Names) -> bool:
    return isinstance(target, str) and target.lower() == "all-linear"


def _first(patterns: Iterable[tuple[Pattern, Any]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _matcher(names: Names, patterns: Patterns) -> Callable[[str], bool]:
    if isinstance(names, str) and names:
        full = patterns.compile(names).fullmatch
        return lambda module: full(module) is not None
    whole = frozenset(names or ())
    return lambda module: any(tail in whole for tail in _tails(module))


def _tails(module: str) -> Iterator[str]:
    """A dotted name and all of its endings."""
    while module:
        yield module
        module = module.partition(".")[2]
