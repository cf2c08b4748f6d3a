"""What this machine can do at most: copying memory and multiplying matrices, measured once a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from triton.testing import do_bench

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def timings(function: Callable[[], Any], device: str, least: float = 0.3) -> list[float]:
    """Seconds of repeated runs after one that does not count: three or more, and `least` seconds in all."""
    if torch.device(device).type == "cuda":
        median, low, high = do_bench(function, quantiles=[0.5, 0.0, 1.0])  # clears the L2 cache between runs
        return [low / 1e3, median / 1e3, high / 1e3]
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < least:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, those read and those written together."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / sorted(timings(lambda: target.copy_(source), device))[1]


@cache
def matrix_rate(device: str, dtype: str) -> float:
    """Operations a second of a square product."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    x = torch.randn(size, size, device=device).to(DTYPES[dtype])
    return 2 * size**3 / sorted(timings(lambda: x @ x, device))[1]
