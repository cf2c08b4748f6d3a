"""What a person sees while it runs: one bar over the whole plan with the time left, or lines at intervals."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from safeshard.manifests.errors import printable
from safeshard.manifests.sizes import human
from safeshard.streamer.tensor_names import layer_of

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

INTERVAL = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """Progress over `total` units (bytes, or what `unit` names) on stderr. Thread-safe.

    On a terminal a bar of rich's with the rate and the time left, elsewhere a line every `INTERVAL` seconds.
    """

    def __init__(self, total: int, quiet: bool, unit: str = "B") -> None:
        self._total, self._unit, self._quiet = total, unit, quiet
        self._done, self._start = 0, time.monotonic()
        self._told = self._start
        self._lock = threading.Lock()
        self._bar = _bar(unit) if not quiet and sys.stderr.isatty() else None
        self._task = self._bar.add_task("", total=total) if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def extend(self, count: int) -> None:
        """Raise the total."""
        with self._lock:
            self._total += count
            if self._bar and self._task is not None:
                self._bar.update(self._task, total=self._total)

    def done(self, name: str, count: int) -> None:
        """Count what was finished, under the name of a module or of what else it is about."""
        layer = layer_of(name)
        what = f"layer {layer}" if layer is not None else printable(name, 30)
        with self._lock:
            self._done += count
            if self._bar and self._task is not None:
                self._bar.update(self._task, completed=self._done, description=what)
                return
            now = time.monotonic()
            if not self._quiet and now - self._told >= INTERVAL:
                self._told = now
                print(f"safeshard: {self._line(what, now - self._start)}", file=sys.stderr, flush=True)

    def _line(self, what: str, elapsed: float) -> str:
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        amounts = (human(each) if self._unit == "B" else str(each) for each in (self._done, self._total))
        left = f", {duration(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        unit = "" if self._unit == "B" else f" {self._unit}s"
        return f"{share:.0%} ({' of '.join(amounts)}{unit}), {what}, {duration(elapsed)} so far{left}"


def _bar(unit: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
    if unit != "B":
        amounts = [MofNCompleteColumn(), TextColumn(f"{unit}s")]
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), *amounts,
        TimeRemainingColumn(), console=Console(stderr=True), transient=True, redirect_stdout=False,
        redirect_stderr=False,
    )  # fmt: skip


def duration(seconds: float) -> str:
    """75 -> '1:15', 3725 -> '1:02:05'."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
