"""What this machine can do at most: copying memory and multiplying matrices, measured once a process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton.testing import do_bench

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceiling:
    """How many bytes, or operations, took how many seconds in each run."""

    amount: int
    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Bytes or operations a second, in the median run."""
        return self.amount / statistics.median(self.seconds)


def timings(function: Callable[[], Any], device: str, least: float = 0.3) -> list[float]:
    """Seconds of repeated runs after one that does not count: three or more, and `least` seconds in all."""
    if torch.device(device).type == "cuda":  # clears the L2 cache between runs
        return [milliseconds / 1e3 for milliseconds in do_bench(function, return_mode="all")]
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < least:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


@cache
def copying(device: str) -> Ceiling:
    """Bytes, those read and those written together."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(2 * source.numel(), tuple(timings(lambda: target.copy_(source), device)))


@cache
def multiplying(device: str, dtype: str) -> Ceiling:
    """Operations of a square product."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    x = torch.randn(size, size, device=device).to(DTYPES[dtype])
    return Ceiling(2 * size**3, tuple(timings(lambda: x @ x, device)))
