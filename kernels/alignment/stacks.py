"""Factors of many adapters multiplied at once, each with the bits that it has alone.

512 columns at once are multiplied up to half again as fast as 16 or 128 are: each call lays its operands out anew. But
libraries of matrices choose the order of summation by the sizes. MKL does not by the number of whole LANES of factors:
so each is padded with zeros to whole LANES, and how many may be multiplied at once is found out for each kind of
product and size of tile. A factor wider than NARROW is multiplied alone, as it is in a job of its own.

Shapes: a stack is S x O, factors B^T one below the other; Y = B^T V is S x I, Z = V Y^T is O x S; a tile is some rows,
or columns, of V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16
NARROW, _, WIDE = WIDTHS = (128, 256, 512)

# Rows of a tile that are multiplied at a time where Y comes first: with more, MKL sums in another order.
PIECE = 128


@dataclass(frozen=True)
class Stack:
    """Factors that are multiplied at once."""

    rows: Tensor
    """S x O, fp32, contiguous."""
    spans: list[slice]
    """Each factor's rows, without what it is padded with."""
    limit: int
    """How many rows may be multiplied at once, where that changes no bit; 0: each factor by itself."""

    def cuts(self, width: int) -> Iterator[slice]:
        """Rows to multiply at once: `width` of them, or with 0 a factor's."""
        starts = range(0, len(self.rows), width) if width else [span.start for span in self.spans]
        for start, stop in zip(starts, [*starts[1:], len(self.rows)], strict=True):
            yield slice(start, stop)


class Widths(NamedTuple):
    """How many rows of a stack are multiplied at once with a tile; 0: each factor by itself."""

    first: int
    second: int
    quick: bool
    """That the second product's faster form has the bits of the plain one."""


ALONE = Widths(0, 0, quick=False)


def stacked(factors: Sequence[Tensor]) -> list[Stack]:
    """The factors (O x r) in stacks, in order."""
    padded = [_padded(factor) for factor in factors]
    # No wider than they are together: finding out takes as much memory as the products.
    limit = next((width for width in WIDTHS if width >= sum(padded)), WIDE) if len(factors) > 1 else 0
    groups: list[list[Tensor]] = []
    room = 0
    for factor, width in zip(factors, padded, strict=True):
        if not groups or width > min(room, NARROW):
            groups.append([])
            room = limit if width <= NARROW else width
        groups[-1].append(factor)
        room -= width
    return [_stack(group, limit if _padded(group[0]) <= NARROW else 0) for group in groups]


def _padded(factor: Tensor) -> int:
    return -(-factor.shape[1] // LANES) * LANES


def _stack(factors: Sequence[Tensor], limit: int) -> Stack:
    spans, end = [], 0
    for factor in factors:
        spans.append(slice(end, end + factor.shape[1]))
        end += _padded(factor)
    rows = factors[0].new_zeros((end, factors[0].shape[0]), dtype=torch.float32)
    for span, factor in zip(spans, factors, strict=True):
        rows[span].copy_(factor.T)
    return Stack(rows, spans, limit)


def row_widths(tiles: Iterable[tuple[int, int]], stack: Stack) -> Widths:
    """For tiles of V's rows: `y.addmm_(stack, tile)`, then `tile @ y.T` or `turned(y, tile)`."""
    return _least(_row_widths(*shape, stack.limit) for shape in tiles) if stack.limit else ALONE


def strip_widths(strips: Iterable[tuple[int, int]], stack: Stack) -> Widths:
    """For strips of V's columns: `y.addmm_(stack, strip)`, then `z += strip @ y.T` or `z.addmm_(strip, y.T)`."""
    return _least(_strip_widths(*shape, stack.limit) for shape in strips) if stack.limit else ALONE


def column_width(tiles: Iterable[tuple[int, int]], stack: Stack) -> int:
    """For tiles of the rows of V^T: `y = tile @ stack.T`, then `z.addmm_(tile.T, y)`."""
    return min(_column_width(*shape) for shape in tiles) if stack.limit else 0


def turned(y: Tensor, tile: Tensor, out: Tensor) -> None:
    """out = y tile^T, S x rows: the transpose of tile y^T, and faster."""
    for piece, z in zip(tile.split(PIECE), out.split(PIECE, dim=1), strict=True):
        torch.mm(y, piece.T, out=z)


def _least(found: Iterable[Widths]) -> Widths:
    first, second, quick = zip(*found, strict=True)
    return Widths(min(first), min(second), all(quick))


def _widest(limit: int, alone: Tensor, product: Callable[[int], Tensor]) -> int:
    """The most rows with which the last LANES of a product (rows x n) are `alone`, those that fewer give as well."""
    widest = 0
    for width in WIDTHS:
        if width > limit or not torch.equal(product(width)[-LANES:], alone):
            break
        widest = width
    return widest


def _draw(*shapes: tuple[int, int]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) for shape in shapes)


@cache
def _row_widths(rows: int, cols: int, limit: int) -> Widths:
    tile, stack = _draw((rows, cols), (limit, rows))
    alone = torch.ones(LANES, cols).addmm_(stack[-LANES:], tile)
    y = torch.ones(limit, cols).addmm_(stack, tile)
    first = _widest(limit, alone, lambda width: torch.ones(width, cols).addmm_(stack[-width:], tile))
    y[-LANES:] = alone
    z_alone, z = (tile @ alone.T).T, torch.empty(limit, rows)

    def turned_product(width: int) -> Tensor:
        turned(y[-width:], tile, out=z[-width:])
        return z

    if (second := _widest(limit, z_alone, turned_product)) == limit:
        return Widths(first, second, quick=True)
    return Widths(first, _widest(NARROW, z_alone, lambda width: (tile @ y[-width:].T).T), quick=False)


@cache
def _strip_widths(rows: int, cols: int, limit: int) -> Widths:
    strip, stack, z = _draw((rows, cols), (limit, rows), (rows, limit))
    alone = torch.zeros(LANES, cols).addmm_(stack[-LANES:], strip)
    y = torch.zeros(limit, cols).addmm_(stack, strip)
    first = _widest(limit, alone, lambda width: torch.zeros(width, cols).addmm_(stack[-width:], strip))
    y[-LANES:] = alone
    z_alone = (z[:, -LANES:] + strip @ alone.T).T
    quick = _widest(limit, z_alone, lambda width: z.clone()[:, -width:].addmm_(strip, y[-width:].T).T)
    if quick:
        return Widths(first, quick, quick=True)
    return Widths(first, _widest(limit, z_alone, lambda width: (z[:, -width:] + strip @ y[-width:].T).T), quick=False)


@cache
def _column_width(rows: int, cols: int) -> int:
    tile, stack = _draw((rows, cols), (NARROW, cols))

    def product(width: int) -> Tensor:
        wide = stack[-width:].T.contiguous()
        return torch.cat((tile @ wide, torch.ones(cols, width).addmm_(tile.T, tile @ wide))).T

    return _widest(NARROW, product(LANES), product)
