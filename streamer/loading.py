"""A start that does not look for garbage: torch and what builds on it make a million objects, all of which stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Let Python's cyclic collector rest while modules are imported: it would walk all of theirs again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
