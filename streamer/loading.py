"""A start that does not look for garbage: torch and what builds on it make a million objects, all of which stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_ends_at_once = False


def end_at_once() -> None:
    """Say that this process ends without the interpreter's last collections, and with all that it will have loaded.

    What is loaded is then set aside for good. Else libraries would report it as leaked in the end.
    """
    global _ends_at_once
    _ends_at_once = True


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
        if _ends_at_once:
            gc.freeze()
        gc.enable()
