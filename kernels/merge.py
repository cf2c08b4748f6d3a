"""Weighted sums of tensors and of LoRA deltas: what SafeMERGE (arXiv 2503.17239, section 3) does where its gate closes.

    linear        sum_i w_i T_i, PEFT's `linear` (task arithmetic, arXiv 2212.04089)
    dare_linear   sum_i w_i (m_i * T_i) / density, PEFT's `dare_linear` (DARE, arXiv 2311.03099); m_i keeps an entry
                  with probability density, by random bits that depend only on the tensor's key and the entry's index
    concatenate   the exact weighted sum of LoRA deltas B_i A_i, by concatenating ranks
    truncate      the best approximation of a delta by one of lower rank (Eckart and Young, 1936)

Example: linear([[1, 2], [3, 4]], [0.5, 2]) = [6.5, 9].
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshard.kernels.backend import Backend, blocks, launch, resolve, upload
from safeshard.kernels.lang import tl, triton
from safeshard.kernels.philox import philox_words

# torch: counters (four entries each) worked on at a time; their temporaries stay in cache.
COUNTERS = 1 << 14

# Columns of a full delta that are taken to fp64 at a time.
DENSE_COLUMNS = 1024

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


def concatenate(adapters: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(A, B) in fp32 with B A = sum_i weights[i] B_i A_i: ranks one after the other, the weights on B.

    Args:
        adapters: one or more pairs (A_i: r_i x I, B_i: O x r_i), bf16, fp16 or fp32.
        weights: one a pair.

    Raises:
        ValueError: numbers or shapes differ.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"adapters and weights must match, got {len(adapters)} and {len(weights)}")
    shapes = {(b.shape[0], a.shape[1]) for a, b in adapters}
    if len(shapes) != 1 or any(a.shape[0] != b.shape[1] for a, b in adapters):
        raise ValueError(f"adapters do not fit: A, B are {[(tuple(a.shape), tuple(b.shape)) for a, b in adapters]}")
    a = torch.cat([a.float() for a, _ in adapters])
    b = torch.cat([b.float() * weight for (_, b), weight in zip(adapters, weights, strict=True)], dim=1)
    return a, b


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of B A of the given rank, and what it loses.

    B = Q_b R_b and A^T = Q_a R_a reduce the delta to the r x r core R_b R_a^T, whose SVD is that of B A; in fp64.
    Each side gets the square roots of the singular values. The entry of largest magnitude in each column of B is
    positive, which fixes the signs. A delta of lower rank is padded with zeros.

    Args:
        a: r x I, bf16, fp16 or fp32.
        b: O x r.
        rank: at least 1.

    Returns:
        A (rank x I, fp32), B (O x rank, fp32) and |B A - result|_F / |B A|_F (0-d fp64; 0 for a zero delta).

    Raises:
        ValueError: shapes do not fit or the rank is below 1.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"A must be r x I and B O x r, got {tuple(a.shape)} and {tuple(b.shape)}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.T.double())
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    left, right = (q_b @ u[:, :kept]) * root, root[:, None] * (vh[:kept] @ q_a.T)
    signs = torch.where(left.gather(0, left.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    new_a, new_b = a.new_zeros((rank, a.shape[1]), dtype=torch.float32), b.new_zeros(b.shape[0], rank).float()
    new_b[:, :kept], new_a[:kept] = left * signs, right * signs.T
    return new_a, new_b, _lost(s[kept:].square().sum(), s.square().sum())


def truncate_dense(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a full delta of the given rank, and what it loses.

    The delta is projected on the leading eigenvectors of its smaller Gram matrix, which is formed in fp64: singular
    values below 1e-8 of the largest are not told from zero.

    Args:
        delta: O x I, bf16, fp16 or fp32.
        rank: at least 1.

    Returns:
        The approximation (O x I, fp32) and |delta - approximation|_F / |delta|_F (0-d fp64; 0 for a zero delta).

    Raises:
        ValueError: delta is not 2-D or the rank is below 1.
    """
    if delta.ndim != 2 or rank < 1:
        raise ValueError(f"delta must be 2-D and rank at least 1, got {tuple(delta.shape)} and {rank}")
    if delta.shape[0] > delta.shape[1]:
        low_rank, lost = truncate_dense(delta.T, rank)
        return low_rank.T, lost
    strips = delta.split(DENSE_COLUMNS, dim=1)
    gram = torch.zeros((len(delta), len(delta)), dtype=torch.float64, device=delta.device)
    for strip in strips:
        gram.addmm_(strip.double(), strip.double().T)
    basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    low_rank = torch.empty(delta.shape, device=delta.device)
    residual = torch.zeros((), dtype=torch.float64, device=delta.device)
    for strip, result in zip(strips, low_rank.split(DENSE_COLUMNS, dim=1), strict=True):
        exact = strip.double()
        approximation = basis @ (basis.T @ exact)
        residual += (exact - approximation).square().sum()
        result.copy_(approximation)
    return low_rank, _lost(residual, gram.diagonal().sum())


def _lost(cut: Tensor, total: Tensor) -> Tensor:
    """sqrt(cut / total) of squared norms, 0 where the total is."""
    return torch.where(total == 0, 0.0, cut / total).sqrt()
