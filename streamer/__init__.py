"""Everything that touches files or the order of work, and the public functions, one a command.

Each function takes the options of its command by name and raises `RequestError` (nothing was written) or `RunError`
(the same call resumes) from `safeshard.manifests.errors`.
"""

from safeshard.streamer.api import (
    batch,
    calibrate,
    inspect,
    report,
    safedelta,
    safelora,
    safemerge,
    scale,
    score,
    verify,
)
from safeshard.streamer.run.runner import Result

__all__ = [
    "Result",
    "batch",
    "calibrate",
    "inspect",
    "report",
    "safedelta",
    "safelora",
    "safemerge",
    "scale",
    "score",
    "verify",
]
