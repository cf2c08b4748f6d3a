"""What a PEFT adapter_config.json means: rank, scaling and targets of every module; unsupported variants are named.

Follows PEFT's own rules (tuners/lora/model.py, tuners/tuners_utils.py). A key this file does not know is refused unless
it is empty: an adapter from a newer PEFT may use it to change what A and B mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safeshard.manifests.errors import Offence

# Keys that say nothing about what A and B mean, or that this module reads itself.
_NEUTRAL = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) train B A against a
# changed base, so B A is not the delta to the aligned model.
_NEUTRAL_INIT = {"True", "False", "None", "gaussian", "eva", "orthogonal"}
_FIX = "merge the adapter into a full checkpoint and use --finetuned, or retrain as plain LoRA"


@dataclass(frozen=True)
class LoraConfig:
    """The parts of adapter_config.json that give A and B their meaning. `raw` is the whole file."""

    raw: dict[str, Any]
    r: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    modules_to_save: tuple[str, ...]

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def scaling(self, module: str) -> float:
        """delta = scaling * B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        alpha, rank = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool | None:
        """Whether the config targets a module; None where it says "all-linear", which the config alone cannot tell."""
        raw = self.raw
        if _names_match(raw.get("exclude_modules"), module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        target = raw.get("target_modules")
        if target == "all-linear":
            return None
        if not _names_match(target, module):
            return False
        layers = raw.get("layers_to_transform")
        if isinstance(target, str) or layers is None or layers == []:
            return True
        return _layer_index(module, raw.get("layers_pattern")) in (layers if isinstance(layers, list) else [layers])


def read_config(where: str, raw: Any) -> LoraConfig | list[Offence]:
    """Read adapter_config.json; return the offences instead where it is malformed or of an unsupported kind."""
    if not isinstance(raw, dict):
        return [Offence(where, "", "a JSON object", type(raw).__name__, "check the file")]
    offences = [Offence(where, key, expected, got, _FIX) for key, expected, got in _unsupported(raw)]
    number = (int, float)
    checks: list[tuple[str, Any, Any]] = [
        ("r", raw.get("r"), lambda v: type(v) is int and v > 0),
        ("lora_alpha", raw.get("lora_alpha"), lambda v: type(v) in number and math.isfinite(v)),
        ("rank_pattern", raw.get("rank_pattern") or {}, lambda v: _is_pattern(v, lambda n: type(n) is int and n > 0)),
        ("alpha_pattern", raw.get("alpha_pattern") or {}, lambda v: _is_pattern(v, lambda n: type(n) in number)),
        ("target_modules", raw.get("target_modules"), _is_names),
        ("exclude_modules", raw.get("exclude_modules") or [], _is_names),
        (
            "modules_to_save",
            raw.get("modules_to_save") or [],
            lambda v: _is_pattern(dict.fromkeys(v, 0), lambda _: True),
        ),
    ]
    for key, value, valid in checks:
        try:
            fine = bool(valid(value))
        except (re.error, TypeError, ValueError, OverflowError):
            fine = False
        if not fine:
            offences.append(Offence(where, key, "what PEFT writes there", repr(value)[:80], "check the file"))
    if offences:
        return offences
    return LoraConfig(
        raw, raw["r"], float(raw["lora_alpha"]), raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {},
        bool(raw.get("use_rslora")), tuple(raw.get("modules_to_save") or ()),
    )  # fmt: skip


def _unsupported(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    if raw.get("peft_type") != "LORA":
        yield "peft_type", "LORA", repr(raw.get("peft_type"))
    if raw.get("bias", "none") != "none":
        yield "bias", "none", repr(raw["bias"])
    init = str(raw.get("init_lora_weights", True))
    if init not in _NEUTRAL_INIT:
        yield "init_lora_weights", "an initialisation that keeps the base weights", repr(init)
    known = _NEUTRAL | {"bias", "init_lora_weights"}
    for key in sorted(raw.keys() - known):
        if raw[key] not in (None, False, {}, [], "", 0):
            yield key, "plain LoRA", f"{key}={raw[key]!r}"[:80]


def _is_pattern(value: Any, valid: Any) -> bool:
    for key, entry in value.items():
        re.compile(key)
        if not valid(entry):
            return False
    return True


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        re.compile(value if value != "all-linear" else "")
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _names_match(names: str | list[str] | None, module: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _layer_index(module: str, patterns: str | list[str] | None) -> int | None:
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
    else:
        found = (
            re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", module)
            for p in ([patterns] if isinstance(patterns, str) else patterns)
        )
        match = next((m for m in found if m), None)
    return int(match["index"]) if match else None
