"""Where an operation runs and how: the implementation, the device of a launch, and copies that nobody waits for."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from typing import Any, Literal, Protocol

import torch

from safeshard.kernels.lang import GPUTarget, has_triton, triton

Backend = Literal["auto", "torch", "triton"]

# What the kernels are compiled for in their tests: NVIDIA from Ampere on, and of AMD these.
LEAST_CAPABILITY = 80
HIP_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100")


class Placed(Protocol):
    """What lies on a device."""

    @property
    def device(self) -> torch.device: ...


@cache
def target(device: torch.device) -> GPUTarget:
    """What kernels on `device` are compiled for; on a CPU, where the interpreter runs them, as for sm_90."""
    if device.type != "cuda":
        return GPUTarget("cuda", 90, 32)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return GPUTarget("hip", properties.gcnArchName.partition(":")[0], properties.warp_size)
    return GPUTarget("cuda", 10 * properties.major + properties.minor, 32)


def supported(architecture: GPUTarget) -> bool:
    """Whether "auto" is Triton there."""
    if architecture.backend == "hip":
        return architecture.arch in HIP_ARCHITECTURES
    return int(architecture.arch) >= LEAST_CAPABILITY


def resolve(backend: Backend, *tensors: Placed) -> Literal["torch", "triton"]:
    """Return the implementation to run on `tensors`.

    "auto" is Triton on CUDA tensors whose device is `supported`, and torch elsewhere. (torch calls AMD's devices
    "cuda", too.) "triton" on CPU tensors needs Triton's interpreter (`TRITON_INTERPRET=1` in the environment before
    the kernels are imported).

    Raises:
        ValueError: `backend` is unknown, the tensors lie on several devices, or the named backend cannot run on them.
    """
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        raise ValueError(f"tensors must share one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    on_cuda = device.type == "cuda"
    if backend == "auto":
        return "triton" if on_cuda and has_triton() and supported(target(device)) else "torch"
    if backend == "torch":
        return "torch"
    if backend != "triton":
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if not has_triton():
        raise ValueError("backend 'triton' needs Triton, which torch brings on Linux alone")
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors")
    return "triton"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Launch a kernel on the device of its tensors, whichever the thread's current one is. An empty grid is no launch.

    Args:
        grid: up to three numbers of programs.
        args: the kernel's arguments; the first tensor among them names the device.
        settings: constexpr arguments, and how to compile: num_warps, num_stages, and always enable_fp_fusion, whose
            default differs between versions of Triton.
    """
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **settings)


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, in the order of its current stream, without a wait: the copy is from pinned memory.

    torch hands out that memory again only once the copy is through.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return int(triton.cdiv(count, size))
