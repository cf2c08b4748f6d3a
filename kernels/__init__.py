"""Tensors in, tensors out: each operation in torch (the reference, on any device) and, where it pays, in Triton.

An operation is `safeshard.kernels.NAME` to whoever uses it, whatever room it lies in. A module is imported when it is
first asked for: whoever only reads options or headers need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeshard.kernels import backend, dense, effect, gate, merge, projection, ranks
    from safeshard.kernels.calibrated import factor, gram, grams, leak, ridge, subspace
    from safeshard.kernels.safedelta import column_compensation, compensation, row_compensation, selection

__all__ = [
    "backend", "column_compensation", "compensation", "dense", "effect", "factor", "gate", "gram", "grams", "leak",
    "merge", "projection", "ranks", "ridge", "row_compensation", "selection", "subspace",
]  # fmt: skip
_ROOMS = {
    "calibrated": {"factor", "gram", "grams", "leak", "ridge", "subspace"},
    "safedelta": {"column_compensation", "compensation", "row_compensation", "selection"},
}


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = next((f"{room}." for room, names in _ROOMS.items() if name in names), "")
    return import_module(f"{__name__}.{room}{name}")
