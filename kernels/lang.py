"""Triton, where there is one: on Linux, whose torch brings it. Elsewhere the kernels are never launched.

Kernels import `triton`, `tl` and `GPUTarget` from here, so that their modules, and the torch implementations in them,
load without Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
except ImportError:

    class _NoTriton:
        """What the modules of kernels ask for while they load: decorators that do nothing, and names."""

        class JITFunction:
            """No kernel is one."""

        def __getattr__(self, name: str) -> Any:
            return _NoTriton()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args else self

        @staticmethod
        def cdiv(count: int, size: int) -> int:
            return -(-count // size)

        @staticmethod
        def next_power_of_2(number: int) -> int:
            return 1 << max(number - 1, 0).bit_length()

    class _Target(NamedTuple):
        """As Triton's own: backend, architecture, lanes of a warp."""

        backend: str
        arch: int | str
        warp_size: int

    triton = tl = _NoTriton()
    GPUTarget = _Target

__all__ = ["GPUTarget", "has_triton", "tl", "triton"]


def has_triton() -> bool:
    """Whether kernels can be launched here."""
    return type(triton).__name__ != "_NoTriton"
