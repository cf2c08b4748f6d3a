"""Memory of a thread for what is computed on the way: kept, and overwritten by the next that asks for it.

The C library gives what was freed back to the system, which hands out fresh pages, zeroed one by one: for tiles of a
few megabytes that takes as long as a pass over them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

MOST_BYTES = 1 << 23  # of one piece that is kept
_own = threading.local()


def scratch(name: str, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of so many elements, not initialised: this thread's under that name, until it asks for it again.

    Of a device it is new, for torch itself keeps a device's memory; and so is what is large.
    """
    nbytes = elements * dtype.itemsize
    if device.type != "cpu" or nbytes > MOST_BYTES:
        return torch.empty(elements, dtype=dtype, device=device)
    kept: Tensor | None = getattr(_own, name, None)
    if kept is None or len(kept) < nbytes:
        kept = torch.empty(nbytes, dtype=torch.uint8)
        setattr(_own, name, kept)
    return kept[:nbytes].view(dtype)
