"""Bounded streaming: readers fill buffers ahead of the workers, never beyond a byte budget.

A step's tensors are read into one buffer; a worker computes with views of it and gives it back. Buffers are reused, so
steady state allocates nothing. With a CUDA device they are pinned, so that copies from them overlap with the rest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.streamer.clock import Clock
from safeshard.streamer.device import own_stream
from safeshard.streamer.inputs.read import TORCH_DTYPES, Step
from safeshard.streamer.pinned import host_memory


class Buffers:
    """Reusable host buffers under a byte limit; counts what is in use."""

    def __init__(self, limit: int, pinned: bool = False) -> None:
        self.limit, self.pinned = limit, pinned
        self.used = self.peak = self._most = 0
        self._free: list[Tensor] = []
        self._changed = threading.Condition()

    def take(self, step: Step) -> Tensor:
        """A buffer for a step's reads, after waiting until its whole cost fits the limit."""
        cost = step.cost
        with self._changed:
            if cost > self.limit:
                raise RunError(
                    f"{step.name} needs {cost} bytes of host memory, --memory is {self.limit}", "raise --memory"
                )
            self._changed.wait_for(lambda: self.used + cost <= self.limit)
            size = step.buffer
            largest = min(2 * size, size + self.limit - self.used - cost)
            fits = [b for b in self._free if size <= b.numel() <= largest]
            buffer = min(fits, key=Tensor.numel, default=None)
            self._free = [b for b in self._free if b is not buffer]
            self.used += cost + (0 if buffer is None else buffer.numel() - size)
            self._most = max(self._most, self.used)
            self._trim(self.limit - self.used)
            if buffer is None:
                buffer = host_memory(size, pinned=self.pinned)
            self.peak = max(self.peak, self.used + sum(map(Tensor.numel, self._free)))
            return buffer

    def give(self, step: Step, buffer: Tensor) -> None:
        """Return a step's buffer."""
        with self._changed:
            self.used -= step.cost + buffer.numel() - step.buffer
            self._free.append(buffer)
            # Fresh memory costs more than to read into it; but large tensors are few, and must not leave theirs behind.
            self._trim(max(self.used, self._most - self.used))
            self._changed.notify_all()

    def _trim(self, room: int) -> None:
        while self._free and sum(map(Tensor.numel, self._free)) > max(room, 0):
            self._free.pop(0)


def run_steps(
    steps: Iterable[Step],
    compute: Callable[[Step, Mapping[Hashable, Tensor]], None],
    *,
    buffers: Buffers,
    clock: Clock,
    workers: int,
    readers: int = 2,
    device: torch.device | None = None,
    done: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Read and compute all steps. Steps start in order and may end in any.

    On a CUDA device each step has a stream of its own: while one computes, others copy, hash and write.

    The first exception of any thread is raised after the steps in flight have ended. `stop` is called as soon as there
    is one: it gives up the reads under way, so that these steps end soon.
    """
    failures: list[BaseException] = []
    slots = threading.BoundedSemaphore(workers + 2 * readers)  # reading further ahead would only fill memory

    def fail(error: BaseException) -> None:
        failures.append(error)
        stop()

    def work(step: Step, buffer: Tensor, begins: Mapping[Hashable, int]) -> None:
        try:
            if not failures:
                torch.set_num_threads(1)
                start = time.perf_counter()
                with own_stream(device):
                    compute(step, _views(step, buffer, begins))
                if not step.strips:  # whose reading is not computing
                    clock.add("compute", start)
                done(step)
        except BaseException as error:
            fail(error)
        finally:
            buffers.give(step, buffer)
            slots.release()

    def fetch(step: Step, buffer: Tensor) -> None:
        begins: dict[Hashable, int] = {}
        try:
            start = time.perf_counter()
            view = buffer.numpy().data
            for read, offset in step.rooms() if not failures else ():
                begins[read.key] = offset + read.into(view[offset : offset + read.room])
            clock.add("read", start, sum(r.ref.nbytes for r in step.reads.values()))
        except BaseException as error:
            fail(error)
        try:
            computing.submit(work, step, buffer, begins)
        except BaseException as error:  # the system gives no thread
            fail(error)
            buffers.give(step, buffer)
            slots.release()

    threads = torch.get_num_threads()  # MKL's part of that setting is the process's, whichever thread sets it
    with (
        ThreadPoolExecutor(workers, "worker") as computing,
        ThreadPoolExecutor(readers, "reader") as reading,
    ):
        try:
            for step in steps:
                slots.acquire()
                if failures:
                    break
                reading.submit(fetch, step, buffers.take(step))
        except BaseException as error:
            fail(error)
        reading.shutdown()  # readers hand their steps to the workers, so they end first
    torch.set_num_threads(threads)
    if failures:
        raise failures[0]


def _views(step: Step, buffer: Tensor, begins: Mapping[Hashable, int]) -> dict[Hashable, Tensor]:
    return {
        key: buffer[begins[key] : begins[key] + read.ref.nbytes].view(TORCH_DTYPES[read.ref.dtype]).view(read.ref.shape)
        for key, read in step.reads.items()
    }
