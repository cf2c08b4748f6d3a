"""Streaming safety re-alignment for fine-tuned language models; the public functions, one a command.

They are imported when they are first asked for, so that `import safeshard` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeshard.manifests.errors import Offence, RequestError, RunError, SafeshardError
    from safeshard.streamer import (
        Result,
        batch,
        calibrate,
        finish,
        inspect,
        lssf,
        report,
        resta,
        ridge,
        safedelta,
        safelora,
        safemerge,
        scale,
        score,
        verify,
    )

    __version__: str

_ERRORS = ("Offence", "RequestError", "RunError", "SafeshardError")
__all__ = [
    "Offence",
    "RequestError",
    "Result",
    "RunError",
    "SafeshardError",
    "__version__",
    "batch",
    "calibrate",
    "finish",
    "inspect",
    "lssf",
    "report",
    "resta",
    "ridge",
    "safedelta",
    "safelora",
    "safemerge",
    "scale",
    "score",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("safeshard")
    if name not in __all__:
        raise AttributeError(f"module 'safeshard' has no attribute {name!r}")
    return getattr(import_module("safeshard.manifests.errors" if name in _ERRORS else "safeshard.streamer"), name)


def __dir__() -> list[str]:
    return __all__
