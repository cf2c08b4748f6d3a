"""How models are called in results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safeshard.bench.evaluation.engines.inspect import SCHEME
from safeshard.manifests.errors import Offence, RequestError


def display_names(models: Sequence[str]) -> list[str]:
    """Short names of models, each its own: the last part of a path, or more where that is shared."""
    parts = [[p for p in model.removeprefix(SCHEME).rstrip("/").split("/") if p not in ("", ".")] for model in models]
    names = []
    for n, mine in enumerate(parts):
        length = next(
            (k for k in range(1, len(mine) + 1) if all(o[-k:] != mine[-k:] for m, o in enumerate(parts) if m != n)),
            len(mine),
        )
        names.append("/".join(mine[-length:]) or models[n])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(Offence("evaluate", twice, "each model once", "twice"))
    return names


def shown(model: str) -> str:
    """A folder by its name alone: its full path says more about a machine than readers should know."""
    return Path(model).name if Path(model).is_absolute() else model
