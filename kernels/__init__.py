"""Tensors in, tensors out: each operation in torch (the reference, on any device) and, where it pays, in Triton.

A submodule is imported when it is first asked for: whoever only reads options or headers need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeshard.kernels import dense, factor, grams, leak, merge, ridge, subspace
    from safeshard.kernels.safedelta import compensation

__all__ = ["compensation", "dense", "factor", "grams", "leak", "merge", "ridge", "subspace"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.safedelta.{name}" if name == "compensation" else f"{__name__}.{name}")
