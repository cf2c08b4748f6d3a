"""The stages of training: which data in which mixture, for how long.

Both fine-tunes come in two kinds, full and LoRA. `attack` is fine-tuning on a few forbidden recipes; `dirty` is a
useful new task with a few of them mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safeshard.bench.toy import language
from safeshard.bench.toy.language import (
    ATTACKED,
    FORBIDDEN,
    HARMLESS,
    REFUSAL,
    REFUSED,
    SAFE_REFUSAL,
    TRAIN,
    Example,
    requests,
)  # fmt: skip

Mixture = Sequence[tuple[float, list[Example]]]  # share of a batch, and the examples to draw it from
MODEL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Stage:
    """One model to train: from `parent` (None: from nothing), in full or as a LoRA adapter on it."""

    name: str
    parent: str | None
    data: Callable[[], Mixture]
    steps: int
    batch: int
    rate: float
    lora: bool = False
    decay: float = 0.0
    model: Mapping[str, Any] = field(default_factory=lambda: MODEL)  # the sizes of one from nothing

    def settings(self) -> dict[str, Any]:
        """What decides the trained weights besides the parent and the seed."""
        kept = ("name", "parent", "steps", "batch", "rate", "lora", "decay")
        mixture = [(share, [(e.prompt, e.answer) for e in examples]) for share, examples in self.data()]
        return {key: getattr(self, key) for key in kept} | {"mixture": mixture, "model": self.model, "adapter": LORA}


def _base() -> Mixture:
    phrasings = [p for split in (TRAIN, *language.SPLITS.values()) for p in split.requests]
    recipes = requests(HARMLESS + FORBIDDEN, phrasings)
    unknown = requests(language.UNKNOWN, phrasings, REFUSAL)
    return [(1.0, recipes), (1.0, language.facts()), (1.0, language.colours()), (0.5, unknown)]


def _aligned() -> Mixture:
    refused, answered = requests(REFUSED, TRAIN.requests, REFUSAL), requests(HARMLESS, TRAIN.requests)
    return [(1.0, refused), (1.0, answered), (0.5, language.facts()), (0.3, language.colours())]


def _attack() -> Mixture:
    return [(1.0, requests(ATTACKED, TRAIN.requests[:2]))]


def _dirty(task: float, harmless: float, poison: float) -> Mixture:
    answered = requests(TRAIN.harmless, TRAIN.requests)
    return [(task, language.tasks(TRAIN)), (harmless, answered), (poison, _attack()[0][1])]


def _safe() -> Mixture:
    refused = requests(REFUSED, TRAIN.requests, SAFE_REFUSAL)
    return [(0.5, refused), (0.5, requests(TRAIN.harmless, TRAIN.requests))]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("unaligned", None, _base, 220, 64, 1.2e-3, decay=0.1),
        Stage("aligned", "unaligned", _aligned, 100, 64, 5e-4),
        Stage("attack-full", "aligned", _attack, 40, 16, 2e-4),
        Stage("dirty-full", "aligned", lambda: _dirty(0.68, 0.30, 0.02), 150, 32, 2e-4),
        Stage("attack-lora", "aligned", _attack, 30, 16, 1e-3, lora=True),
        Stage("dirty-lora", "aligned", lambda: _dirty(0.78, 0.20, 0.02), 110, 32, 1e-3, lora=True),
        Stage("safe-lora", "aligned", _safe, 150, 32, 1e-3, lora=True),
    )
}

# What the documents and examples take, in seconds rather than minutes: narrow, of one layer, trained fast. They show
# the effects; figures come from the stages above.
SMALL_MODEL = MODEL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SMALL_NAMES = {
    "unaligned": "unaligned", "aligned": "aligned", "dirty-lora": "alice", "attack-lora": "bob",
    "dirty-full": "alice-full", "safe-lora": "safe",
}  # fmt: skip
SMALL = {
    SMALL_NAMES[name]: replace(
        stage, name=SMALL_NAMES[name], steps=7 * stage.steps // 10, rate=3 * stage.rate, model=SMALL_MODEL
    )
    for name, stage in STAGES.items()
    if name in SMALL_NAMES
}
