"""Each kernel over shapes of real models, against the published formulation and what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safeshard.bench import published
from safeshard.bench.inputs.models import SHAPES
from safeshard.bench.machine.ceilings import DTYPES, copying, multiplying, timings
from safeshard.bench.machine.roofline import Bound, Card, bound, find
from safeshard.bench.rows import record
from safeshard.kernels.calibrated.factor import Factor, safety_factor
from safeshard.kernels.calibrated.gram import accumulate
from safeshard.kernels.gate import lora_gate
from safeshard.kernels.merge import linear
from safeshard.kernels.projection import project
from safeshard.kernels.safedelta.compensation import safe_delta_dense

TOKENS = 2048
STRENGTH, KEPT = 1e12, 0.85  # of Safe Delta: as much is kept, and compensated, as its selection ever keeps
OPERATIONS = ("projection", "gate", "gram", "factor", "compensation", "row", "weight", "merge")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operation at one size: least bytes moved and operations, those published, and memory."""

    operation: str
    rows: int
    columns: int
    rank: int
    adapters: int
    nbytes: int
    operations: int
    published_operations: int
    memory: int

    @property
    def label(self) -> str:
        of = f", {self.adapters} of rank {self.rank}" if self.adapters else ""
        return f"{self.operation} {self.rows} x {self.columns}{of}"


def cases(names: Sequence[str], shape: str, ranks: Sequence[int], adapters: Sequence[int]) -> Iterator[Case]:
    """The cases of some operations over the distinct projections of a model."""
    for rows, columns in sorted(set(SHAPES[shape].projections.values())):
        size, square = rows * columns, columns * columns
        for name in names:
            if name in ("projection", "gate"):
                for rank in ranks:
                    for count in adapters:
                        wide = rank * count
                        dense = 2 * rows * rows * (columns + (columns if name == "gate" else rank)) * count
                        yield Case(
                            name, rows, columns, rank, count, 4 * size + 8 * wide * rows, 4 * size * wide, dense,
                            4 * (rows * rows + 4 * size),
                        )  # fmt: skip
            else:
                nbytes, operations, dense = {
                    "gram": (2 * TOKENS * columns + 8 * square, TOKENS * square, 2 * TOKENS * square),
                    "factor": (8 * square, 2 * columns**3 // 3, 4 * columns**3 // 3),
                    "compensation": (9 * size + 2 * square, int(KEPT * size * columns), 2 * size * columns),
                    "row": (9 * size + 2 * square, int(KEPT * size * columns), 0),
                    "weight": (
                        9 * size + 8 * square, 2 * columns**3 // 3 + int(KEPT * size * columns),
                        4 * columns**3 // 3 + 2 * size * columns,
                    ),
                    "merge": (8 * size, 3 * size, 3 * size),
                }[name]  # fmt: skip
                yield Case(name, rows, columns, 0, 0, nbytes, operations, dense, 4 * (4 * square + 6 * size))


def distinct(names: Sequence[str], shape: str, ranks: Sequence[int], adapters: Sequence[int]) -> Iterator[Case]:
    """The cases that differ: a Gram and a factor have one size."""
    seen: set[tuple[Any, ...]] = set()
    for case in cases(names, shape, ranks, adapters):
        size = case.columns if case.operation in ("gram", "factor") else (case.rows, case.columns)
        key = (case.operation, size, case.rank, case.adapters)
        if key not in seen:
            seen.add(key)
            yield case


def print_roofline(names: Sequence[str], shape: str, ranks: Sequence[int], adapters: Sequence[int], card: Card) -> None:
    """Print how long each case takes on a card at best, by its data sheet."""
    for case in distinct(names, shape, ranks, adapters):
        if (least := _bound(case, card)) is not None:
            print(f"{case.label}: {least}")


def _bound(case: Case, card: Card) -> Bound | None:
    return bound(card, case.operation, case.rows, case.columns, case.rank * case.adapters, TOKENS)


def run(
    names: Sequence[str],
    shape: str,
    ranks: Sequence[int],
    adapters: Sequence[int],
    device: str,
    limit: float,
    file: str = "kernels",
) -> list[str]:
    """Time every case on every backend; append a row each and print it, on a known card beside its static roofline.

    Returns what failed. On a device the rest is measured all the same: the first run on a card tells most.

    Args:
        device: "cpu" or "cuda:N". Triton runs on CUDA alone. On a CPU one thread computes, as a job's worker does.
        limit: seconds that one run may be expected to take; longer ones are skipped, and said so.
        file: the table that rows are appended to.
    """
    torch.set_num_threads(1)
    cuda = torch.device(device).type == "cuda"
    card = None
    if cuda:
        torch.cuda.set_device(device)
        card = find(name := torch.cuda.get_device_name(device))
        if card is None:
            print(f"{name}: its data sheet is not known here: no static roofline beside the rows")
    _ceilings(device, file)
    failed: list[str] = []
    for case in distinct(names, shape, ranks, adapters):
        dtype = "bf16" if cuda and case.operation == "gram" else "fp32"
        rate = multiplying(device, dtype).rate
        label, floor = f"{case.rows} x {case.columns}", max(case.nbytes / copying(device).rate, case.operations / rate)
        if why := _too_large(case, floor, device, limit):
            print(f"{case.operation} {label}: skipped: {why}")
            continue
        for backend, function in backends(case, device).items():
            own = case.published_operations if backend == "published" else case.operations
            if own / rate > limit:
                print(f"{case.operation} {label} {backend}: skipped: needs {own / rate:.0f} s or more")
                continue
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                seconds = timings(function, device)
            except Exception as error:
                if not cuda:
                    raise
                failed.append(f"{case.label}, {backend}")
                print(f"{failed[-1]}: failed: {type(error).__name__}: {error}")
                continue
            median = record(
                file, seconds, nbytes=case.nbytes, operations=case.operations, floor=floor,
                what=case.operation, shape=label, dtype=dtype, backend=backend, adapters=case.adapters or "",
                rank=case.rank or "", ceiling="copy and matrix rate", cache="in memory",
                peak_device_bytes=torch.cuda.max_memory_allocated() if cuda else "",
            )  # fmt: skip
            if backend == "triton" and card is not None and (least := _bound(case, card)) is not None:
                reached = f"{least.seconds / median:.0%} of it, {least.share:.0%} wanted"
                print(f"    {card.name} by its data sheet: {least}; {reached}")
    return failed


def _too_large(case: Case, floor: float, device: str, limit: float) -> str:
    """Why a case is not run: its memory, or its time at best."""
    if case.memory > (room := _free(device)):
        return f"needs {case.memory / 2**30:.1f} GiB of {room / 2**30:.1f}"
    return f"needs {floor:.0f} s or more" if floor > limit else ""


def _ceilings(device: str, file: str) -> None:
    copied = copying(device)
    record(file, copied.seconds, nbytes=copied.amount, what="copy", cache="in memory")
    for dtype in DTYPES:
        product = multiplying(device, dtype)
        record(file, product.seconds, operations=product.amount, what="square product", dtype=dtype, cache="in memory")


def _free(device: str) -> int:
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def backends(case: Case, device: str) -> dict[str, Run]:
    """The functions to time by backend, on operands that they share."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(0.02).to(dtype)

    names: list[Any] = ["torch", *(["triton"] * (torch.device(device).type == "cuda"))]
    rows, columns, operation = case.rows, case.columns, case.operation
    if operation in ("projection", "gate", "merge"):
        v, w = (random(rows, columns, dtype=torch.bfloat16) for _ in range(2))
        if operation == "merge":
            runs: dict[str, Run] = {n: partial(linear, [v, w], [0.8, 0.2], backend=n) for n in names}
            weights = torch.tensor([0.8, 0.2], device=device)[:, None, None]
            return runs | {"published": lambda: (torch.stack([v, w]).float() * weights).sum(0)}
        pairs = [(random(case.rank, columns), random(rows, case.rank)) for _ in range(case.adapters)]
        if operation == "gate":
            runs = {n: partial(lora_gate, v, w, pairs, backend=n) for n in names}
            return runs | {"published": lambda: [published.gate(v, w, a, b) for a, b in pairs]}
        runs = {n: partial(project, v, w, [b for _, b in pairs], backend=n) for n in names}
        return runs | {"published": lambda: [published.projection_matrix(v, w) @ b for _, b in pairs]}
    x = random(TOKENS, columns, dtype=torch.bfloat16)
    h = torch.zeros(columns, columns, device=device)
    if operation == "gram":
        runs = {n: partial(accumulate, h, x, backend=n) for n in names}
        return runs | {"published": partial(published.gram, x)}
    h = published.gram(x)
    if operation == "factor":
        return {"torch": partial(safety_factor, h), "published": partial(published.factor, h)}
    delta = random(rows, columns)
    if operation == "weight":
        runs = {n: partial(_whole_weight, delta, h, n) for n in names}
        return runs | {"published": lambda: published.safe_delta(delta, published.factor(h), STRENGTH)}
    factor: Factor = safety_factor(h)
    selection: Any = "row" if operation == "row" else "block"
    runs = {n: partial(safe_delta_dense, delta, factor, STRENGTH, selection=selection, backend=n) for n in names}
    return (
        runs if operation == "row" else runs | {"published": partial(published.safe_delta, delta, factor.u, STRENGTH)}
    )


def _whole_weight(delta: torch.Tensor, h: torch.Tensor, backend: Any) -> Any:
    return safe_delta_dense(delta, safety_factor(h), STRENGTH, backend=backend)
