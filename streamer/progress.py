"""What a person sees: one bar over bytes while it runs, the plan before, and a summary after."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from safeshard.manifests.errors import printable
from safeshard.streamer.tensor_names import layer_of


class Progress:
    """A tqdm bar over the bytes to read, with the rate and the current layer. Thread-safe through tqdm's lock."""

    def __init__(self, total: int, quiet: bool, unit: str = "B") -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def extend(self, nbytes: int) -> None:
        """Raise the total."""
        self._bar.total = (self._bar.total or 0) + nbytes
        self._bar.refresh()

    def done(self, name: str, nbytes: int) -> None:
        """Count a finished step."""
        layer = layer_of(name)
        self._bar.set_description_str(f"layer {layer}" if layer is not None else printable(name, 30), refresh=False)
        self._bar.update(nbytes)


def human(nbytes: float) -> str:
    """1500 -> '1.50 kB', as the table of a manifest writes it."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
