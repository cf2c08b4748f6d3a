"""Launches at the shapes of Llama 70B as the launchers make them, recorded from operations on tensors without data.

torch's fake tensors stand for those of a device, so no device is needed. They hold no values: an operation that asks
for one, which on a device would wait for it, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from indexing import Indexing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from safeshard.kernels import backend
from safeshard.kernels.alignment.coded import Coded, Kind
from safeshard.kernels.calibrated.gram import accumulate
from safeshard.kernels.calibrated.half import pack, packed_size, unpack
from safeshard.kernels.effect import Pair, products_of_each
from safeshard.kernels.gate import dense_gate, lora_gate
from safeshard.kernels.merge import Sum, dare_linear, linear, linear_of_each
from safeshard.kernels.projection import project
from safeshard.kernels.safedelta.row_compensation import _chunk_triton
from safeshard.kernels.safedelta.selection import column_squares

WIDE, NARROW = 28672, 8192  # intermediate and hidden size
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, grid, arguments, settings (constexprs and options), and the thread's device."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    settings: dict[str, Any]
    device: torch.device


def empty(*size: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cuda:0")


def gate(count: int, rank: int, dtype: torch.dtype = BF16) -> None:
    pairs = [(empty(rank, NARROW), empty(WIDE, rank)) for _ in range(count)]
    lora_gate(empty(WIDE, NARROW, dtype=dtype), empty(WIDE, NARROW, dtype=dtype), pairs)


def coded(kind: Kind, rows: int = WIDE, columns: int = NARROW, block: tuple[int, int] = (128, 128)) -> Coded:
    """A quantised weight: of fp8 with a scale a block, or MXFP4."""
    if kind == "e2m1":
        codes, scales = (empty(rows, columns // step, dtype=torch.uint8) for step in (2, 32))
        return Coded(kind, codes, scales, (1, 32))
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return Coded(kind, empty(rows, columns, dtype=torch.uint8), empty(*grid), block)


def coded_gate(aligned: Coded, unaligned: Coded | Tensor, rank: int = 16) -> None:
    rows, columns = aligned.shape
    lora_gate(aligned, unaligned, [(empty(rank, columns), empty(rows, rank))])


def rows_of_a_chunk() -> None:
    """Of `selection="row"`: the columns of a chunk within wider matrices."""
    x, u = empty(NARROW, WIDE), empty(WIDE, WIDE)
    kept, error = empty(NARROW, 2048, dtype=torch.bool), empty(NARROW, 2048)
    own = slice(2176, 2304)
    _chunk_triton(x[:, own], x[:, own], kept[:, 128:256], u[own, own], error[:, 128:256], 4)


def effect(count: int, rank: int, new_rank: int) -> None:
    def pair() -> Pair:
        a, b, new_a, new_b = empty(rank, NARROW), empty(WIDE, rank), empty(new_rank, NARROW), empty(WIDE, new_rank)
        return Pair(a, b, 2.0, new_a, new_b, 1.0, BF16, BF16)

    products_of_each([pair() for _ in range(count)])


def merges() -> None:
    """Of many adapters, merged with one and the same."""
    linear_of_each([Sum([empty(NARROW, 16, dtype=BF16)] * 2, [0.8, 0.2]) for _ in range(64)])


OPERATIONS: dict[str, Callable[[], Any]] = {
    "gate 16": lambda: gate(1, 16),
    "gate 8 x 16": lambda: gate(8, 16),
    "gate 64 x 16": lambda: gate(64, 16),
    "gate of fp8": lambda: coded_gate(coded("e4m3"), coded("e4m3")),
    "gate of MXFP4": lambda: coded_gate(coded("e2m1"), coded("e2m1")),
    "gram bf16": lambda: accumulate(empty(WIDE, WIDE), empty(4096, WIDE, dtype=BF16)),
    "merge": lambda: linear([empty(NARROW, 2048, dtype=BF16)] * 2, [0.8, 0.2]),
    "merges": merges,
    "effect 64 x 16": lambda: effect(64, 16, 16),
    "columns": lambda: column_squares(empty(NARROW, WIDE)[:, 2048:4096], empty(NARROW, WIDE)[:, 2048:4096]),
    "rows": rows_of_a_chunk,
}
MORE: dict[str, Callable[[], Any]] = {
    "project 8": lambda: project(*[empty(NARROW, WIDE, dtype=BF16)] * 2, [empty(NARROW, 8)]),
    "project 64": lambda: project(*[empty(NARROW, WIDE, dtype=BF16)] * 2, [empty(NARROW, 64)]),
    "project 32": lambda: project(*[empty(NARROW, WIDE, dtype=BF16)] * 2, [empty(NARROW, 32)]),
    "gate fp16": lambda: gate(4, 16, torch.float16),
    "gate fp32": lambda: gate(16, 16, FP32),
    "gate of odd rank": lambda: gate(3, 7),
    "gate of rank 256": lambda: gate(1, 256),
    "gate of odd shape": lambda: lora_gate(*[empty(1001, 777, dtype=BF16)] * 2, [(empty(16, 777), empty(1001, 16))]),
    "gate stored transposed": lambda: lora_gate(
        *[empty(NARROW, WIDE, dtype=BF16).T] * 2, [(empty(16, NARROW), empty(WIDE, 16))]
    ),
    "gate of fp8 by row and bf16": lambda: coded_gate(
        coded("e4m3", block=(1, NARROW)), empty(WIDE, NARROW, dtype=BF16), 64
    ),
    "gate of fp8 by tensor and MXFP4": lambda: coded_gate(coded("e4m3", block=(WIDE, NARROW)), coded("e2m1"), 256),
    "gate of fp8 of odd shape": lambda: coded_gate(*[coded("e4m3", 1001, 777, (100, 50))] * 2),
    "effect of other ranks": lambda: effect(3, 7, 40),
    "dense gate": lambda: dense_gate(*[empty(WIDE, NARROW, dtype=BF16)] * 3),
    "gram fp32": lambda: accumulate(empty(NARROW, NARROW), empty(4096, NARROW)),
    "gram fp16": lambda: accumulate(empty(NARROW, NARROW), empty(4096, NARROW, dtype=torch.float16)),
    "gram of odd size": lambda: accumulate(empty(1001, 1001), empty(300, 1001, dtype=BF16)),
    "pack": lambda: pack(empty(WIDE, WIDE)),
    "unpack": lambda: unpack(empty(packed_size(WIDE)), WIDE),
    "merge fp32": lambda: linear([empty(NARROW, 2048)] * 2, [0.8, 0.2]),
    "merge with drops": lambda: dare_linear([empty(NARROW, 2048, dtype=BF16)] * 2, [0.8, 0.2], 0.5, [2**63 + 5, 1]),
}  # fmt: skip


@contextmanager
def device(architecture: GPUTarget) -> Iterator[list[Launch]]:
    """Inside, tensors are fake, "cuda" is a device of this architecture, and launches are recorded, not made."""
    properties = SimpleNamespace(gcnArchName=str(architecture.arch), warp_size=architecture.warp_size)
    if architecture.backend == "cuda":
        properties.major, properties.minor = divmod(architecture.arch, 10)
    recorded: list[Launch] = []
    current: list[torch.device] = []

    @contextmanager
    def guard(own: torch.device) -> Iterator[None]:
        current.append(own)
        yield
        current.pop()

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **settings: Any) -> None:
        recorded.append(Launch(kernel, grid, args, settings, current[-1]))

    def interpreted(kernel: Any, grid: tuple[int, ...]) -> Any:
        return partial(run, kernel, grid=grid, warmup=False)

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Indexing())
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
        stack.enter_context(mock.patch.object(torch.cuda, "device", guard))
        stack.enter_context(mock.patch.object(torch.version, "hip", "7.0" if architecture.backend == "hip" else None))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self: self))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(InterpretedFunction, "__getitem__", interpreted))
        stack.callback(backend.target.cache_clear)
        backend.target.cache_clear()
        yield recorded
