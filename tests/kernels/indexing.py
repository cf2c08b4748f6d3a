"""`x[...]`, `~x` and such for tensors on a device that this build of torch does not know: its own ask that device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Indexing(TorchFunctionMode):
    """Inside, indexing is made of views by select, slice and unsqueeze, and of `aten.index` where a tensor indexes."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (args and isinstance(args[0], Tensor) and args[0].is_cuda):
            return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            return _part(*args)
        if func is Tensor.__setitem__:
            assert not any(isinstance(own, Tensor) for own in (args[1] if isinstance(args[1], tuple) else args[1:2]))
            part = _part(*args[:2])
            return _copy(part, args[2]) if isinstance(args[2], Tensor) else part.fill_(args[2])
        if func is Tensor.copy_:
            return _copy(*args, **(kwargs or {}))
        if func is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **(kwargs or {}))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():  # which asks the device, too
        return torch.ops.aten.copy_.default(target, source, non_blocking)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    groups = q.shape[1] // k.shape[1] if enable_gqa else 1
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(torch.logical_not(attn_mask), float("-inf"))
    return scores.softmax(-1) @ v


def _part(x: Tensor, key: Any) -> Tensor:
    dim, tensors = 0, {}
    for own in key if isinstance(key, tuple) else (key,):
        if own is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(own, int):
            x = x.select(dim, own)
        elif isinstance(own, slice):
            start, stop, step = own.indices(x.shape[dim])
            x, dim = torch.ops.aten.slice.Tensor(x, dim, start, max(start, stop), step), dim + 1
        elif own is Ellipsis:
            dim = x.ndim - sum(other is not None for other in key[key.index(Ellipsis) + 1 :])
        else:
            tensors[dim] = own
            dim += own.ndim if own.dtype == torch.bool else 1
    if tensors:
        x = torch.ops.aten.index.Tensor(x, [tensors.get(place) for place in range(max(tensors) + 1)])
    return x
