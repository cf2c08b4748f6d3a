"""What an edit leaves of a fine-tuned delta D: the inner products of D and of the delta N that is written.

    |N| / |D|                       the share of the delta's norm that is left
    <N, D> / (|N| |D|)              the cosine between the two

For LoRA deltas D = s B A and N = t B' A' nothing of their shape is formed:

    |D|^2  = s^2 sum((B^T B) * (A A^T))
    <N, D> = s t sum((B^T B') * (A A'^T))
    |N|^2  = t^2 sum((B'^T B') * (A' A'^T))

but where a rank is above O or I: such a delta's own entries are fewer, and are formed some rows at a time.

Shapes: weights, D and N are O x I; B is O x r, A is r x I; B' and A' have a rank of their own.

Example: D = [[3, 4]] and N = [[3, 0]] give |D|^2 = 25, <N, D> = 9 and |N|^2 = 9: 60 % of the norm, cosine 0.6.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safeshard.kernels.backend import blocks, launch, resolve, upload
from safeshard.kernels.lang import tl, triton

# Elements of a factor, taken to fp64 at a time: on the CPU in its cache, on a device in one launch.
ELEMENTS, DEVICE_ELEMENTS = 1 << 15, 1 << 24
FORMED_ROWS = 64  # of a delta that is formed, at least: fewer would read the other factor more often


# Triton, deltas of a batch: rows of one product, rows of one program, the tile of a Gram matrix that a program owns.
BLOCK_N, CHUNK_N, BLOCK_R, BLOCK_SUM = 16, 512, 16, 256
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


class Products(NamedTuple):
    """Inner products of the delta that came in, D, and of the one written, N; 0-d fp64 tensors, or their sums."""

    before: Tensor
    """|D|^2"""
    after: Tensor
    """|N|^2"""
    inner: Tensor
    """<N, D>"""


def _grams(x: Tensor, *others: Tensor) -> list[Tensor]:
    """x^T x in fp64, and of another factor y of as many rows and columns x^T y and y^T y, all taken to fp64 once."""
    count, width = len(others), x.shape[1]
    totals = [torch.zeros((width, width), dtype=torch.float64, device=x.device) for _ in range(1 + 2 * count)]
    elements = ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    rows = max(1, elements // max(1, width))
    for start in range(0, len(x), rows):
        left, *right = (factor[start : start + rows].double() for factor in (x, *others))
        pairs = [(left, left), *((left, y) for y in right), *((y, y) for y in right)]
        for total, (one, other) in zip(totals, pairs, strict=True):
            total.addmm_(one.T, other)
    return totals


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """x^T y in fp64, of two factors with the same rows."""
    total = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    elements = ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    rows = max(1, elements // max(1, x.shape[1], y.shape[1]))
    for start in range(0, len(x), rows):
        total.addmm_(x[start : start + rows].double().T, y[start : start + rows].double())
    return total


def _grams_of(old: Tensor, new: Tensor) -> list[Tensor]:
    """X^T X, X^T X' and X'^T X' of an old factor X and a new one."""
    if new is old:
        return _grams(old) * 3
    if old.shape == new.shape:
        return _grams(old, new)
    return [*_grams(old), _gram(old, new), *_grams(new)]


def _is_wide(a: Tensor, b: Tensor, new_a: Tensor) -> bool:
    """Whether the deltas' entries are less than Grams of their rank."""
    return max(len(a), len(new_a)) > min(a.shape[1], len(b))


def _formed_products(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> Tensor:
    """|B A|^2, |B' A'|^2 and <B A, B' A'> in fp64: both are formed by rows, or by columns where a row is longer."""
    same = new_a is a and new_b is b
    if a.shape[1] > len(b):
        a, b, new_a, new_b = b.T, a.T, new_b.T, new_a.T
    rank = max(len(a), len(new_a))
    rows = max(FORMED_ROWS, ELEMENTS // rank) if a.device.type == "cpu" else DEVICE_ELEMENTS // rank + 1
    short = a.double()
    new_short = short if same else new_a.double()
    total = torch.zeros(3, dtype=torch.float64, device=a.device)
    for start in range(0, len(b), rows):
        old = b[start : start + rows].double() @ short
        new = old if same else new_b[start : start + rows].double() @ new_short
        total += torch.stack([(x * y).sum() for x, y in ((old, old), (new, new), (old, new))])
    return total


def lora_products(a: Tensor, b: Tensor, scaling: float, new_a: Tensor, new_b: Tensor, new_scaling: float) -> Products:
    """The products of D = scaling B A and N = new_scaling B' A', in fp64 throughout.

    Args:
        a, b: r x I and O x r, any float dtype.
        new_a, new_b: r' x I and O x r'.
    """
    if _is_wide(a, b, new_a):
        before, after, inner = _formed_products(a, b, new_a, new_b).unbind()
        return Products(before * scaling**2, after * new_scaling**2, inner * (scaling * new_scaling))
    if new_a is a and new_b is b and new_scaling == scaling:
        (gram_a,), (gram_b,) = _grams(a.T), _grams(b)
        before = (gram_a * gram_b).sum().clamp_min(0) * scaling**2
        return Products(before, before, before)
    a_t = a.T
    grams_a, grams_b = _grams_of(a_t, a_t if new_a is a else new_a.T), _grams_of(b, new_b)
    before, both, after = ((of_a * of_b).sum() for of_a, of_b in zip(grams_a, grams_b, strict=True))
    scale = scaling * new_scaling
    return Products(before.clamp_min(0) * scaling**2, after.clamp_min(0) * new_scaling**2, both * scale)


class Pair(NamedTuple):
    """A LoRA delta that came in and the one written in its place, as `lora_products` takes them.

    A' and B' are rounded to `kind_a` and `kind_b` first, in which they are written.
    """

    a: Tensor
    b: Tensor
    scaling: float
    new_a: Tensor
    new_b: Tensor
    new_scaling: float
    kind_a: torch.dtype
    kind_b: torch.dtype

    @property
    def likeness(self) -> Hashable:
        """Equal for pairs that are measured together."""
        shapes = self.a.shape, self.b.shape, self.new_a.shape, self.new_b.shape
        return shapes, self.kind_a, self.kind_b, self.a_stays, self.b_stays

    @property
    def a_stays(self) -> bool:
        """Whether A' is A to the bit."""
        return self.new_a is self.a and self.kind_a == self.a.dtype

    @property
    def b_stays(self) -> bool:
        """Whether B' is B to the bit."""
        return self.new_b is self.b and self.kind_b == self.b.dtype


def products_of_each(pairs: Sequence[Pair]) -> list[Products]:
    """`lora_products` of many pairs on one device, those of one shape together, in few launches.

    The products of a pair do not depend, to the bit, on the others.
    """
    fp64 = any(kind == torch.float64 for p in pairs for kind in (p.a.dtype, p.b.dtype, p.kind_a, p.kind_b))
    in_torch = not pairs or fp64 or resolve("auto", *(pair.a for pair in pairs)) == "torch"
    alike: dict[Hashable, list[int]] = {}
    found: dict[int, Products] = {}
    for index, p in enumerate(pairs):
        if in_torch or _is_wide(p.a, p.b, p.new_a):
            new_a, new_b = p.new_a.to(p.kind_a), p.new_b.to(p.kind_b)
            found[index] = lora_products(p.a, p.b, p.scaling, new_a, new_b, p.new_scaling)
        else:
            alike.setdefault(p.likeness, []).append(index)
    for members in alike.values():
        found |= dict(zip(members, _products_triton([pairs[index] for index in members]), strict=True))
    return [found[index] for index in range(len(pairs))]


@triton.jit
def _grams_kernel(
    x_ptr,  # n x R, fp32, strided: the old factors of all pairs side by side, then the new ones that are others
    out_ptr,  # chunks x members x 3 x most x most, fp64
    n,
    rank,  # of an old factor
    new_rank,
    new_first,  # where the new ones begin: 0 where they are the old ones
    most,  # the larger rank
    stride_n,
    stride_r,
    CHUNK: tl.constexpr,  # rows of a program, a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[c, member] = X^T X, X^T X', X'^T X' over the c-th chunk of rows of a pair's old X and new X', in fp64.

    Grid: (tiles of most x tiles of most, members x 3, chunks).
    """
    tiles = tl.cdiv(most, BLOCK_R)
    member, which, part = tl.program_id(1) // 3, tl.program_id(1) % 3, tl.program_id(2)
    i = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_i, rank_j = tl.where(which == 2, new_rank, rank), tl.where(which == 0, rank, new_rank)
    first_i = tl.where(which == 2, new_first + member * new_rank, member * rank)
    first_j = tl.where(which == 0, member * rank, new_first + member * new_rank)
    cols_i, cols_j = (first_i + i).to(tl.int64) * stride_r, (first_j + j).to(tl.int64) * stride_r
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, n), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        offsets, inside = rows.to(tl.int64)[:, None] * stride_n, (rows < n)[:, None]
        x = tl.load(x_ptr + offsets + cols_i[None, :], inside & (i < rank_i)[None, :], 0.0).to(tl.float64)
        y = tl.load(x_ptr + offsets + cols_j[None, :], inside & (j < rank_j)[None, :], 0.0).to(tl.float64)
        acc += tl.sum(x[:, :, None] * y[:, None, :], axis=0)
    place = part.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    out = (place * most + i[:, None]) * most + j[None, :]
    tl.store(out_ptr + out, acc, (i < most)[:, None] & (j < most)[None, :])


@triton.jit
def _inner_kernel(
    a_ptr,  # a_chunks x members x 3 x size, fp64: of A^T
    b_ptr,  # b_chunks x members x 3 x size, fp64: of B
    scale_ptr,  # members x 3, fp64
    out_ptr,  # members x 3, fp64
    size,
    a_chunks,
    b_chunks,
    BLOCK: tl.constexpr,
):
    """out = scale sum(A's Gram * B's Gram), each the sum of its chunks. Grid: (members x 3,)."""
    own, count = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    acc = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        a, b = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        for chunk in range(a_chunks):
            a += tl.load(a_ptr + (chunk * count + own) * size + entry, inside, 0.0)
        for chunk in range(b_chunks):
            b += tl.load(b_ptr + (chunk * count + own) * size + entry, inside, 0.0)
        acc += a * b
    tl.store(out_ptr + own, tl.sum(acc) * tl.load(scale_ptr + own))


def _grams_triton(wide: Tensor, members: int, rank: int, new_rank: int) -> Tensor:
    """chunks x members x 3 x most x most of `_grams_kernel`, of an n x R view of all factors."""
    n, most = len(wide), max(rank, new_rank)
    tiles = blocks(most, BLOCK_R)
    chunk = CHUNK_N * tiles * tiles  # as many programs for each rank, and as much memory
    chunks = max(1, blocks(n, chunk))
    out = torch.empty((chunks, members, 3, most, most), dtype=torch.float64, device=wide.device)
    new_first = members * rank if wide.shape[1] > members * rank else 0
    launch(
        _grams_kernel, (tiles * tiles, members * 3, chunks), wide, out, n, rank, new_rank, new_first, most,
        *wide.stride(), CHUNK=chunk, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, **LAUNCH,
    )  # fmt: skip
    return out


def _products_triton(pairs: Sequence[Pair]) -> list[Products]:
    """Of pairs that are alike."""
    first, members = pairs[0], len(pairs)
    rank, new_rank = len(first.a), len(first.new_a)

    wide_a, wide_b = torch.cat([p.a for p in pairs]).float(), torch.cat([p.b for p in pairs], 1).float()
    if not first.a_stays:
        wide_a = torch.cat((wide_a, torch.cat([p.new_a for p in pairs]).to(first.kind_a).float()))
    if not first.b_stays:
        wide_b = torch.cat((wide_b, torch.cat([p.new_b for p in pairs], 1).to(first.kind_b).float()), 1)
    a, b = (_grams_triton(wide, members, rank, new_rank) for wide in (wide_a.T, wide_b))
    scales = [(p.scaling**2, p.scaling * p.new_scaling, p.new_scaling**2) for p in pairs]
    out = torch.empty((members, 3), dtype=torch.float64, device=a.device)
    launch(
        _inner_kernel, (members * 3,), a, b, upload(torch.tensor(scales, dtype=torch.float64), a.device), out,
        max(rank, new_rank) ** 2, len(a), len(b), BLOCK=BLOCK_SUM, **LAUNCH,
    )  # fmt: skip
    return [Products(before, after, inner) for before, inner, after in (row.unbind() for row in out.unbind())]
