"""A device that is not there: its tensors say that they are on "cuda:1" and lie on the CPU; what is asked is counted.

Inside `stand_in()` torch and the kernels run as on a device, in torch's own arithmetic and Triton's interpreter.
Counted are launches (of kernels, and of torch's operations but for views) and waits: reading a value, copying to the
host without pinned memory or `non_blocking`, copying from pageable memory, sizes that depend on values, synchronize().
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from indexing import Indexing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.interpreter import InterpretedFunction

from safeshard.kernels import backend

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda:1")
aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
    aten.masked_select.default, aten._linalg_check_errors.default, aten._unique2.default,
}  # fmt: skip
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class OnDevice(Tensor):
    """A tensor of the stand-in device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], held: Tensor) -> OnDevice:
        own = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        own.held = held
        return own

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of stand_in()")


class Device(TorchDispatchMode):
    """What the stand-in has counted.

    Attributes:
        waits: where the host waited for the device: the innermost lines of the project, or the operation.
        launches: names of kernels and operations, in order.
        streams: how many were made.
        refuses_to_pin: what the driver says when it is asked.
        registered: address -> size of host memory that the driver knows as pinned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.streams = 0
        self.refuses_to_pin = False
        self.registered: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._held: list[Tensor] = []  # so that no other memory comes to lie where pinned memory lay

    def for_another_thread(self) -> Device:
        """A mode that counts for this one."""
        other = Device()
        other.__dict__.update(
            {name: value for name, value in vars(self).items() if isinstance(value, (list, dict, set))}
        )
        return other

    def wait(self, what: object) -> None:
        stack = [f for f in reversed(traceback.extract_stack()) if f.filename.startswith(str(ROOT))]
        place = next((f for f in stack if "/tests/" not in f.filename and "site-packages" not in f.filename), None)
        self.waits.append(f"{what} at {place.filename}:{place.lineno}" if place else str(what))

    def pin(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return address in self._pinned or address in self.registered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnDevice)]
        device, pin = kwargs.get("device"), kwargs.pop("pin_memory", None)
        to_device = bool(device is not None and torch.device(device).type == "cuda")
        if to_device:
            kwargs["device"] = torch.device("cpu")
        on_device = to_device or (bool(given) and (device is None or to_device))
        if func in COPIES:
            on_device = self._copy(func, args, kwargs, to_device, device)
        elif given or to_device:
            if func in ASKING or (
                func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
            ):
                self.wait(func)
            elif not func.is_view and func not in EMPTY:
                self.launches.append(str(func))
        known = {id(x.held): x for x in given}
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
        result = func(*args, **kwargs)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in known:
                return known[id(x)]
            if pin or (given and not on_device):
                self.pin(x)
            return OnDevice(x) if on_device else x

        return tree_map(wrapped, result)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], to_device: bool, device: Any) -> bool:
        """Count a copy; return whether its result is on the device."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            there, here = isinstance(target, OnDevice), isinstance(source, OnDevice)
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            pinned = self.is_pinned(source if there else target) if there != here else True
        else:
            source = args[0]
            here = isinstance(source, OnDevice)
            there = to_device or (here and device is None)
            blocking, pinned = not kwargs.get("non_blocking", False), here or self.is_pinned(source)
        if there == here:
            if here:
                self.launches.append(str(func))
        elif (blocking or not pinned) and source.numel():
            self.wait(f"copy {'up' if there else 'down'}")
        return there

    def launch(self, kernel: InterpretedFunction, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **settings: Any) -> None:
            self.launches.append(kernel.fn.__name__)
            args, settings = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, settings))
            with _INTERPRETER, torch.utils._python_dispatch._disable_current_modes():
                launch(kernel, grid)(*args, **settings)

        launch = _GETITEM
        return run


_GETITEM = InterpretedFunction.__getitem__
_INTERPRETER = threading.Lock()  # it changes Triton's own module while a kernel runs


@contextmanager
def stand_in() -> Iterator[Device]:
    """Inside, "cuda:0" and "cuda:1" are the stand-in device, for this thread and others within `torch.cuda.stream`."""
    device = Device()

    @contextmanager
    def guard(_: object) -> Iterator[None]:
        yield

    @contextmanager
    def on_stream(_: object) -> Iterator[None]:
        with Indexing(), device.for_another_thread():
            yield

    def register(address: int, nbytes: int, _: int) -> int:
        if device.refuses_to_pin:
            return 2
        device.registered[address] = nbytes
        return 0

    event = SimpleNamespace(synchronize=lambda: device.wait("event"))
    stream = SimpleNamespace(
        synchronize=lambda: device.wait("synchronize"), record_event=lambda *_: event, wait_event=lambda _: None,
        wait_stream=lambda _: None,
    )  # fmt: skip
    driver = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: device.registered.pop(address) * 0
    )

    def make_stream(*_: object) -> SimpleNamespace:
        device.streams += 1
        return stream

    properties = SimpleNamespace(major=9, minor=0)
    with ExitStack() as stack:
        for name, value in {
            "_lazy_init": lambda: None, "Stream": make_stream, "cudart": lambda: driver,
            "current_stream": lambda *_: stream, "stream": on_stream, "device": guard, "device_count": lambda: 2,
            "is_available": lambda: True, "empty_cache": lambda: None, "max_memory_allocated": lambda *_: 1,
            "reset_peak_memory_stats": lambda *_: None, "get_device_name": lambda *_: "stand-in",
            "get_device_properties": lambda _: properties, "synchronize": lambda *_: device.wait("synchronize"),
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda own: device.pin(own.clone())))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", return_value=None))
        stack.enter_context(
            mock.patch.object(InterpretedFunction, "__getitem__", lambda own, grid: device.launch(own, grid))
        )
        stack.callback(backend.target.cache_clear)
        backend.target.cache_clear()
        stack.enter_context(Indexing())
        stack.enter_context(device)
        yield device
