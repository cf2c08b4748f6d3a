"""NaN and infinity, looked for by exponent bits in whatever is computed with, written or copied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.streamer.inputs.read import TORCH_DTYPES, Read
from safeshard.streamer.plan.job_plan import Copy

_EXPONENTS = {  # the integer type of a dtype's size, and the bits that are all set in NaN and infinity alone
    torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000), torch.float8_e4m3fn: (torch.uint8, 0x7F),
}  # fmt: skip


class NotFiniteError(RunError):
    """A tensor holds NaN, infinity, or a value too large for its dtype."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a contiguous host tensor holds neither NaN nor infinity, by its exponent bits.

    In bounded memory; torch.isfinite makes a mask of the whole tensor, and is slow on half precision.
    """
    if tensor.dtype not in _EXPONENTS:
        return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    integer, mask = _EXPONENTS[tensor.dtype]
    parts = torch.split(tensor.reshape(-1).view(integer), 1 << 20)
    return all(int(part.bitwise_and(mask).max()) != mask for part in parts if part.numel())


def _finite_on_device(tensor: Tensor) -> Tensor:
    """Whether a tensor holds neither NaN nor infinity, as a 0-d tensor on its device: nothing waits for it here."""
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    values = tensor if tensor.dtype in _EXPONENTS else tensor.float()
    return torch.stack(torch.aminmax(values)).isfinite().all()  # both are NaN where one value is


def check_copy(copy: Copy, data: memoryview) -> None:
    """Refuse NaN and infinity in bytes of a tensor that is copied; NotFiniteError names it."""
    dtype = TORCH_DTYPES.get(copy.ref.dtype)
    if dtype in _EXPONENTS and not all_finite(torch.frombuffer(data, dtype=dtype)):
        where = f"{copy.source.spec}/{copy.ref.file}: {copy.ref.name}"
        raise NotFiniteError(f"{where} holds NaN or infinity", "mend the checkpoint, then run again")


def refuse_not_finite(tensors: Iterable[tuple[Read, Tensor]]) -> None:
    """Name the input tensor that holds NaN or infinity, if one does; tensors of a device are waited for once.

    Raises:
        RunError: one does.
    """
    given = list(tensors)
    far = [tensor for _, tensor in given if tensor.is_cuda]
    flags = iter(torch.stack([_finite_on_device(tensor) for tensor in far]).tolist() if far else ())
    for read, tensor in given:
        if not (next(flags) if tensor.is_cuda else all_finite(tensor)):
            where = f"{read.source.spec}/{read.ref.file}: {read.ref.name}"
            raise RunError(f"{where} holds NaN or infinity", "mend the checkpoint, then run again")
