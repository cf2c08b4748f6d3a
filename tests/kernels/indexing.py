"""`x[...]` for tensors that claim a device which this build of torch does not know: its own asks that device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Indexing(TorchFunctionMode):
    """Inside, indexing is made of views by select, slice and unsqueeze, and of `aten.index` where a tensor indexes."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _part(*args)
        if func is Tensor.__setitem__:
            part = _part(*args[:2])
            return part.copy_(args[2]) if isinstance(args[2], Tensor) else part.fill_(args[2])
        return func(*args, **(kwargs or {}))


def _part(x: Tensor, key: Any) -> Tensor:
    dim = 0
    for own in key if isinstance(key, tuple) else (key,):
        if own is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(own, int):
            x = x.select(dim, own)
        elif isinstance(own, slice):
            start, stop, step = own.indices(x.shape[dim])
            x, dim = torch.ops.aten.slice.Tensor(x, dim, start, max(start, stop), step), dim + 1
        else:
            x, dim = torch.ops.aten.index.Tensor(x, [None] * dim + [own]), dim + own.ndim
    return x
