"""Host memory of exact size: of huge pages, and pinned where a device copies from it or to it.

torch's own pinned memory is rounded up to a power of two and never given back, so what a budget counts would not be
what is taken. This memory is mapped, registered with the driver, and unregistered and unmapped once nobody holds it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class _Mapping(mmap.mmap):
    """Anonymous memory; `unpin` is set while the driver knows it."""

    unpin: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unpin is not None and not sys.is_finalizing():  # at its end a process gives everything back
            self.unpin()


def host_memory(nbytes: int, *, pinned: bool = False) -> Tensor:
    """`nbytes` bytes (uint8) on the host, page-aligned; copying and reading huge pages goes faster.

    Where the driver refuses to pin them the memory is as it is, which a warning says: copies then wait.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = _Mapping(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a hint, which a kernel may not know
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping for as long as it lives
    if pinned:
        driver: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(driver.cudaHostRegister(tensor.data_ptr(), nbytes, 0)) == 0:
            memory.unpin = partial(driver.cudaHostUnregister, tensor.data_ptr())
        else:
            log.warning("the driver does not pin %d bytes: copies to and from the device wait for each other", nbytes)
    return tensor
