"""Which implementation of an operation runs: the device of its tensors decides, unless the caller names one."""

from __future__ import annotations

import os
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]


def resolve(backend: Backend, *tensors: torch.Tensor) -> Literal["torch", "triton"]:
    """Return the implementation to run on `tensors`.

    "auto" is Triton on CUDA tensors and torch elsewhere. "triton" on CPU tensors needs Triton's interpreter
    (`TRITON_INTERPRET=1` in the environment before the kernels are imported).

    Raises:
        ValueError: `backend` is unknown, the tensors lie on several devices, or the named backend cannot run on them.
    """
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        raise ValueError(f"tensors must share one device, got {sorted(map(str, devices))}")
    on_cuda = devices.pop().type == "cuda"
    if backend == "auto":
        return "triton" if on_cuda else "torch"
    if backend == "torch":
        return "torch"
    if backend != "triton":
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors")
    return "triton"
