"""Weighted sums of tensors and of LoRA deltas: what SafeMERGE (arXiv 2503.17239, section 3) does where its gate closes.

    linear        sum_i w_i T_i, PEFT's `linear` (task arithmetic, arXiv 2212.04089)
    dare_linear   sum_i w_i (m_i * T_i) / density, PEFT's `dare_linear` (DARE, arXiv 2311.03099); m_i keeps an entry
                  with probability density, by random bits that depend only on the tensor's key and the entry's index

Example: linear([[1, 2], [3, 4]], [0.5, 2]) = [6.5, 9].
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshard.kernels.backend import Backend, blocks, launch, resolve, upload
from safeshard.kernels.ground.philox import philox_words
from safeshard.kernels.lang import tl, triton

# torch: counters (four entries each) worked on at a time; their temporaries stay in cache.
COUNTERS = 1 << 14


# Triton: counters of one program. Without fp fusion a product is rounded before it is added, as in torch.
BLOCK = 256
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["key", "threshold"])
def _accumulate_kernel(
    x_ptr,  # n, bf16/fp16/fp32, contiguous
    out_ptr,  # n, fp32, contiguous
    n,
    weight,
    key: tl.int64,  # its 64 bits, signed
    density,
    threshold: tl.int64,  # a word below it keeps its entry
    FIRST: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out += weight x, with DROP over the entries that their random word keeps, divided by density.

    Grid: (blocks of 4 BLOCK entries). FIRST takes out as zero.
    """
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    mask = entry < n
    x = tl.load(x_ptr + entry, mask, 0.0).to(tl.float32)
    if DROP:
        zero = tl.zeros((BLOCK,), tl.uint32)
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key.to(tl.int64), low, high, zero, zero)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        x = tl.where(words.to(tl.int64) < threshold, tl.div_rn(x, density), 0.0)
    out = tl.zeros((4 * BLOCK,), tl.float32)
    if not FIRST:
        out = tl.load(out_ptr + entry, mask, 0.0)
    tl.store(out_ptr + entry, out + weight * x, mask)


@triton.jit
def _accumulate_each_kernel(
    x_ptr,  # members x n, bf16/fp16/fp32, contiguous
    weight_ptr,  # members, fp32
    out_ptr,  # members x n, fp32, contiguous
    n,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_accumulate_kernel` without DROP for many: out[member] += weight[member] x[member]. Grid: (blocks, members)."""
    member = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n
    x = tl.load(x_ptr + member * n + entry, mask, 0.0).to(tl.float32)
    out = tl.zeros((BLOCK,), tl.float32)
    if not FIRST:
        out = tl.load(out_ptr + member * n + entry, mask, 0.0)
    tl.store(out_ptr + member * n + entry, out + tl.load(weight_ptr + member) * x, mask)


def _accumulate_triton(out: Tensor, x: Tensor, weight: float, density: float, key: int, *, first: bool) -> None:
    n = x.numel()
    signed = key - (1 << 64) if key >> 63 else key
    launch(
        _accumulate_kernel, (blocks(n, 4 * BLOCK),), x.contiguous(), out, n, weight, signed, density,
        _threshold(density), FIRST=first, DROP=density < 1, BLOCK=BLOCK, **LAUNCH,
    )  # fmt: skip


def _accumulate_torch(out: Tensor, x: Tensor, weight: Tensor, density: float, key: int) -> None:
    # As a tensor on the device: there, torch turns the division by a Python number into a product with its inverse.
    divisor = upload(torch.tensor(density, dtype=torch.float32), x.device)
    flat, result = x.reshape(-1), out.view(-1)
    for start in range(0, len(flat), 4 * COUNTERS):
        part = slice(start, min(start + 4 * COUNTERS, len(flat)))
        entries = flat[part].float()
        if density < 1:
            length = part.stop - part.start
            words = philox_words(key, start // 4, triton.cdiv(length, 4), x.device).view(-1)[:length]
            entries = torch.where(words < _threshold(density), entries / divisor, 0.0)
        # The product must be rounded before it is added, so there is no add_(alpha=...), which may fuse the two.
        result[part] += entries * weight


def _threshold(density: float) -> int:
    """An entry is kept when its 32-bit word is below this: integers, so that no rounding decides."""
    return int(density * (1 << 32))


def _weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, keys: Sequence[int], backend: Backend
) -> Tensor:
    if not tensors or not len(tensors) == len(weights) == len(keys):
        raise ValueError(f"tensors, weights and keys must match, got {len(tensors)}, {len(weights)} and {len(keys)}")
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"tensors must have one shape, got {sorted({tuple(tensor.shape) for tensor in tensors})}")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if resolve(backend, *tensors) == "triton":
        out = torch.empty(tensors[0].shape, device=tensors[0].device)
        for i, (tensor, number, key) in enumerate(zip(tensors, weights, keys, strict=True)):
            _accumulate_triton(out, tensor, number, density, key, first=i == 0)
        return out
    # From zero, as torch sums: a sum of negative zeros is then a positive one.
    out = torch.zeros(tensors[0].shape, device=tensors[0].device)
    rounded = upload(torch.tensor(weights, dtype=torch.float32), out.device)
    for tensor, weight, key in zip(tensors, rounded, keys, strict=True):
        _accumulate_torch(out, tensor, weight, density, key)
    return out


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, backend: Backend = "auto") -> Tensor:
    """sum_i weights[i] tensors[i] in fp32, to the bit what PEFT computes from up to four fp32 tensors.

    Weights and products are rounded to fp32, then added in the order given. (Of five and more, PEFT's order of
    addition depends on their shape.)

    Args:
        tensors: one or more tensors of one shape, bf16, fp16 or fp32.
        weights: one a tensor.

    Raises:
        ValueError: numbers or shapes differ, or the backend cannot run.
    """
    return _weighted_sum(tensors, weights, 1.0, [0] * len(tensors), backend)


@dataclass(frozen=True)
class Sum:
    """A `linear` that is still to be formed: on a device many are formed together."""

    tensors: Sequence[Tensor]
    weights: Sequence[float]

    @property
    def shape(self) -> torch.Size:
        """That of the result."""
        return self.tensors[0].shape

    def formed(self) -> Tensor:
        """The sum by itself."""
        return linear(self.tensors, self.weights)


def linear_of_each(sums: Sequence[Sum]) -> list[Tensor]:
    """`linear` of many sums of one device, to the bit; those of one shape together, in a few launches.

    Raises:
        ValueError: as `linear`.
    """
    alike: dict[Hashable, list[int]] = {}
    for index, each in enumerate(sums):
        kinds = tuple((tensor.shape, tensor.dtype) for tensor in each.tensors)
        alike.setdefault((kinds, len(each.weights)), []).append(index)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        group = [sums[index] for index in members]
        together = len(group) > 1 and resolve("auto", *(t for each in group for t in each.tensors)) == "triton"
        formed = _each_triton(group) if together else [each.formed() for each in group]
        found |= dict(zip(members, formed, strict=True))
    return [found[index] for index in range(len(sums))]


def _each_triton(sums: Sequence[Sum]) -> list[Tensor]:
    shape, n, members = sums[0].shape, sums[0].tensors[0].numel(), len(sums)
    if len({tensor.shape for tensor in sums[0].tensors}) != 1 or len(sums[0].tensors) != len(sums[0].weights):
        return [each.formed() for each in sums]  # which says what is wrong
    by_term = torch.tensor([each.weights for each in sums], dtype=torch.float32).T.contiguous()
    weights = upload(by_term, sums[0].tensors[0].device)
    out = torch.empty((members, n), device=weights.device)
    for term, own in enumerate(weights):
        x = torch.cat([each.tensors[term].reshape(-1) for each in sums])
        launch(
            _accumulate_each_kernel, (blocks(n, 4 * BLOCK), members), x, own, out, n, FIRST=term == 0, BLOCK=4 * BLOCK,
            **LAUNCH,
        )  # fmt: skip
    return [row.view(shape) for row in out.unbind()]


def linear_or_later(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor | Sum:
    """`linear`, formed at once on a CPU; on a device a `Sum`, to be formed together with others."""
    return Sum(tensors, weights) if tensors[0].is_cuda else linear(tensors, weights)


def dare_linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    keys: Sequence[int],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`linear` of tensors whose entries were dropped with probability 1 - density and otherwise divided by density.

    Whether entry i (in row-major order) of tensor k is kept depends only on keys[k] and i: see
    `kernels/philox.py`. Density 1 is `linear`.

    Args:
        tensors: one or more tensors of one shape, bf16, fp16 or fp32.
        weights: one a tensor.
        density: in (0, 1].
        keys: one a tensor, 0 <= key < 2^64.

    Raises:
        ValueError: numbers or shapes differ, the density or a key is out of range, or the backend cannot run.
    """
    if not all(0 <= key < 1 << 64 for key in keys):
        raise ValueError(f"keys must lie in [0, 2^64), got {list(keys)}")
    return _weighted_sum(tensors, weights, density, keys, backend)
