"""Optional dependencies, imported where they are needed, with a message that names what to install."""

from __future__ import annotations

import importlib
from typing import Any

from safeshard.manifests.errors import Offence, RequestError


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


def require_transformers() -> Any:
    """Import and return `transformers`."""
    return require("transformers", "calibration")
