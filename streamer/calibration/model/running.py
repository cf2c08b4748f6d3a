"""How batches run: side by side on a CPU, each on one thread; on a device one after the other, on a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

import safeshard.kernels.ground.first_calls  # noqa: F401
from safeshard.streamer.calibration.model.ahead import Load
from safeshard.streamer.calibration.model.skeleton import Skeleton
from safeshard.streamer.device import memory_errors, own_stream, wait


@contextmanager
def computing(device: torch.device, path: str, remedy: str) -> Iterator[None]:
    """Inside, this thread has a stream of its own, and a device without memory is refused with what to do."""
    with own_stream(device), memory_errors(path, remedy):
        yield


@contextmanager
def filled_on_device(skeleton: Skeleton, path: str, load: Load, device: torch.device, remedy: str) -> Iterator[None]:
    """Inside, a layer has its weights on the device, whichever stream computes."""
    filled = skeleton.filled(path, load, device)
    with computing(device, path, remedy):
        filled.__enter__()
        wait(device)
    try:
        yield
    finally:
        filled.__exit__(None, None, None)


def one_by_one(run: Callable[[int], None], numbers: Iterable[int]) -> None:
    for number in numbers:
        run(number)


def side_by_side(workers: int, run: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Run batches at once, each on one thread of the CPU."""
    with ThreadPoolExecutor(workers, "batch", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(run, numbers):
            pass


def arriving(hidden: Sequence[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Each batch's hidden states on the device; those of the next are copied while one is computed."""
    own = torch.cuda.current_stream(device)
    with own_stream(device):
        copying = torch.cuda.current_stream(device)
    coming: list[tuple[torch.Tensor, torch.cuda.Event]] = []
    for states in [*hidden, None]:
        if states is not None:
            with torch.cuda.stream(copying):
                arrived = states.to(device, non_blocking=True)
                arrived.record_stream(own)
                coming.append((arrived, copying.record_event()))
        if states is None or len(coming) == 2:
            arrived, event = coming.pop(0)
            own.wait_event(event)
            yield arrived


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread of the CPU: how it cuts work into pieces changes the last bits of a Gram."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
