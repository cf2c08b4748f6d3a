"""Thread-seconds and bytes by stage, for the manifest."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict


class Clock:
    """Thread-seconds, and bytes read, by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, stage: str, start: float, nbytes: int = 0) -> None:
        """Count the time since `start` (of time.perf_counter) and `nbytes` bytes read to a stage."""
        with self._lock:
            self.seconds[stage] += time.perf_counter() - start
            self.bytes[stage] += nbytes
