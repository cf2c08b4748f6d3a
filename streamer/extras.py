"""Optional dependencies, imported where they are needed, with a message that names what to install."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from safeshard.manifests.errors import Offence, RequestError


def require_installed(package: str, extra: str) -> None:
    """Refuse a missing optional package before any work, without importing it.

    Raises:
        RequestError: it is not installed; names the extra that brings it.
    """
    if importlib.util.find_spec(package) is None:
        remedy = f"pip install 'safeshard[{extra}]'"
        raise RequestError(Offence(package, "", "an installed package", "none", remedy))


def require(package: str, extra: str) -> Any:
    """Import and return an optional package.

    Raises:
        RequestError: it is not installed, or its import fails; names the extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        remedy = f"pip install 'safeshard[{extra}]'"
        raise RequestError(Offence(package, "", "an installed package", str(error), remedy)) from error


def require_transformers(extra: str = "calibration") -> Any:
    """Import and return `transformers`, which fetches no compiled kernels from the Hub, whatever a model may name.

    Where it is imported already, or the variable is set, that stays the user's decision.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    return require("transformers", extra)
