"""The compute device: streams and landing memory that last as long as the process, waits, and running out of memory."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.streamer.pinned import host_memory

LANDING_BYTES = 16 << 20  # of host memory where the results of a step arrive, a worker
T = TypeVar("T")


class _Lent(Generic[T]):
    """Things that are made once and lent again and again: as many come to be as are lent at a time."""

    def __init__(self, make: Callable[[torch.device], T]) -> None:
        self._make = make
        self._free: defaultdict[torch.device, list[T]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[T]:
        with self._lock:
            own = self._free[device].pop() if self._free[device] else None
        own = self._make(device) if own is None else own
        try:
            yield own
        finally:
            with self._lock:
                self._free[device].append(own)


# A stream has memory of its own in torch's cache, and in cuBLAS: a new one for each layer would strand both.
_streams: _Lent[torch.cuda.Stream] = _Lent(lambda device: torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
_landings: _Lent[Tensor] = _Lent(lambda _: host_memory(LANDING_BYTES, pinned=True))


@contextmanager
def own_stream(device: torch.device | None) -> Iterator[None]:
    """Inside, a thread's work goes to `device`, on a stream that no other thread uses; on a CPU nothing changes."""
    with ExitStack() as stack:
        if device is not None and device.type == "cuda":
            stack.enter_context(torch.cuda.stream(stack.enter_context(_streams.lend(device))))
        yield


def wait(device: torch.device) -> None:
    """Until all that this thread asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Arrivals:
    """Brings a device's results to the host and uses them there in order: a wait for as many as fit LANDING_BYTES.

    On a CPU nothing is put off.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._landing = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._coming: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, slice]]] = {}
        self._due: list[Callable[[], None]] = []

    @contextmanager
    def landing(self) -> Iterator[None]:
        """Inside, results can be added; on the way out, unless something failed, all have been used."""
        if self._device.type != "cuda":
            yield
            return
        with _landings.lend(self._device) as self._landing:
            try:
                yield
            except BaseException:
                wait(self._device)  # the inputs' buffer goes back to the readers, and the landing to the next step
                raise
            self._wait_and_use()

    def add(self, tensor: Tensor, dtype: torch.dtype, use: Callable[[Tensor], None]) -> None:
        """Let `use` have a device's tensor on the host, cast to `dtype` before, flat, in pieces if it is large."""
        for piece in torch.split(tensor.reshape(-1), LANDING_BYTES // dtype.itemsize):
            nbytes = piece.numel() * dtype.itemsize
            if self._used + nbytes > LANDING_BYTES:
                self._wait_and_use()
            place = slice(self._used, self._used + nbytes)
            self._coming.setdefault((piece.dtype, dtype), []).append((piece, place))
            self._used += -(-nbytes // 64) * 64
            self._due.append(lambda place=place: use(self._landing[place].view(dtype)))  # type: ignore[misc]

    def then(self, action: Callable[[], None]) -> None:
        """Do something once all that was added before has been used."""
        if self._device.type == "cuda":
            self._due.append(action)
        else:
            action()

    def _wait_and_use(self) -> None:
        due, used, coming = self._due, self._used, self._coming
        self._due, self._used, self._coming = [], 0, {}
        if coming:  # cast and laid side by side by a launch for each kind, and brought by one copy
            staging = torch.empty(used, dtype=torch.uint8, device=self._device)
            for (_, dtype), pieces in coming.items():
                torch._foreach_copy_(
                    [staging[place].view(dtype) for _, place in pieces], [piece for piece, _ in pieces]
                )
            self._landing[:used].copy_(staging, non_blocking=True)
        wait(self._device)
        for action in due:
            action()


class _Turns:
    """Steps run beside each other, or one alone."""

    def __init__(self) -> None:
        self._running, self._alone = 0, False
        self._changed = threading.Condition()
        self._order = threading.Lock()  # of those that want to be alone

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._order:
            with self._changed:
                self._alone = True
                self._changed.wait_for(lambda: self._running == 0)
            try:
                yield
            finally:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()


_turns = _Turns()
# What CUDA, HIP, their libraries and Triton say besides torch.cuda.OutOfMemoryError.
_MEMORY_TEXTS = ("CUDA error: out of memory", "HIP error: out of memory", "]: out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out, whichever library noticed."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_TEXTS)


def first_line(error: BaseException) -> str:
    """What an error says first; the rest of a device's is about its allocator."""
    return str(error).partition("\n")[0]


def relieved(device: torch.device, first: Callable[[], T], again: Callable[[str], T]) -> T:
    """What `first` returns; where it runs out of the device's memory, what `again` does, alone and with nothing cached.

    `again` is given the reason. It begins once all others that were relieved have ended, for they hold memory, too.
    """
    why = None
    with _turns.beside_others():
        try:
            return first()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
    with _turns.alone():  # not while the error is handled: it would keep the memory of what failed
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return again(why)


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Inside, running out of a device's memory is an error that says so, and what to do.

    Raises:
        RunError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"{what}: the device is out of memory: {first_line(error)}", remedy) from error


def tried_twice(device: torch.device, what: str, work: Callable[[], T]) -> T:
    """What `work` returns, beside others or, where memory runs out, alone.

    Raises:
        RunError: there is too little memory for it alone.
    """

    def again(_: str) -> T:
        with memory_errors(what, "use a device with more memory, or --device cpu; the same command resumes"):
            return work()

    return relieved(device, work, again)


_exact_lock = threading.Lock()
_exact_depth = 0
_before: tuple[str | None, list[tuple[Any, str]]] = (None, [])


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, the process multiplies fp32 matrices as fp32, whatever was set: neither as TF32 nor as bf16."""
    global _exact_depth, _before
    with _exact_lock:
        if _exact_depth == 0:
            _before = _precision()
            torch.set_float32_matmul_precision("highest")
        _exact_depth += 1
    try:
        yield
    finally:
        with _exact_lock:
            _exact_depth -= 1
            if _exact_depth == 0:
                _restore(*_before)


def _precision() -> tuple[str | None, list[tuple[Any, str]]]:
    """What is set: by torch's old interface (None where old and new contradict), and by its new one (from 2.9 on)."""
    places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    new = [(place, place.fp32_precision) for place in places if hasattr(place, "fp32_precision")]
    try:
        return torch.get_float32_matmul_precision(), new
    except RuntimeError:
        return None, new


def _restore(old: str | None, new: list[tuple[Any, str]]) -> None:
    if old is not None:
        torch.set_float32_matmul_precision(old)
    for place, value in new:
        place.fp32_precision = value
