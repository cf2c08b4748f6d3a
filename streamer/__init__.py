"""Everything that touches files or the order of work, and the public functions, one a command.

Each function takes the options of its command by name and raises `RequestError` (nothing was written) or `RunError`
(the same call resumes) from `safeshard.manifests.errors`. They are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeshard.streamer.api import (
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
    from safeshard.streamer.run.result import Result

__all__ = [
    "Result",
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
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        import_module("safeshard.streamer.run.result" if name == "Result" else "safeshard.streamer.api"), name
    )
