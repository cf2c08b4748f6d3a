"""Many factors at once: each has the bits that it has alone, however many a library lets stand side by side."""

from __future__ import annotations

import pytest
import torch
from test_projection import factors, weights

from safeshard.kernels.alignment import stacks, tiles
from safeshard.kernels.alignment.stacks import NARROW, WIDE, stacked
from safeshard.kernels.projection import project

RANKS = [*[16] * 12, 5, 200, 40, *[16] * 30]  # stacks of 208, 48 + 464 and 16 rows, and one by itself between them


def test_narrow_factors_are_stacked_and_wide_ones_go_alone() -> None:
    found = stacked(factors(0, 20, RANKS))
    assert [(len(stack.rows), len(stack.spans), stack.limit) for stack in found] == [
        (208, 13, WIDE), (208, 1, 0), (512, 30, WIDE), (16, 1, WIDE),
    ]  # fmt: skip
    assert [stack.limit for n in (1, 2, 8, 9, 17, 40) for stack in stacked(factors(0, 20, [16] * n))][:5] == [
        0, NARROW, NARROW, 2 * NARROW, WIDE,
    ]  # fmt: skip
    for stack in found:
        for width in (0, NARROW, WIDE):
            assert [row for cut in stack.cuts(width) for row in range(cut.start, cut.stop)] == [*range(len(stack.rows))]
    whole = [stack.rows[span] for stack in found for span in stack.spans]
    assert all(torch.equal(own, factor.T) for own, factor in zip(whole, factors(0, 20, RANKS), strict=True))
    padded = torch.cat([stack.rows for stack in found])
    assert padded.count_nonzero() == 20 * sum(RANKS)


@pytest.mark.parametrize("least", [0, NARROW, 2 * NARROW, WIDE])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("rows", "cols", "transposed"), [(1100, 500, False), (5000, 150, False), (700, 900, True)])
def test_bits_are_those_alone_in_every_form(
    rows: int, cols: int, transposed: bool, least: int, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips, row tiles and columns, as the library allows: with fewer at once, or the plain forms, the same."""
    aligned, unaligned = (w.bfloat16() for w in weights(2, rows, cols, transposed=transposed))
    batch = factors(3, rows, RANKS)
    alone = [project(aligned, unaligned, [batch[index]], backend="torch") for index in (0, 12, 13, 14, -1)]
    found = stacks._row_widths, stacks._strip_widths
    for name, widths in zip(("_row_widths", "_strip_widths"), found, strict=True):

        def less(*shape: int, of: object = widths) -> stacks.Widths:
            first, second, keeps = of(*shape)  # type: ignore[operator]
            wide = second if quick or not keeps else 0  # the plain form was not looked at
            return stacks.Widths(min(first, least), min(wide, least), quick and keeps)

        monkeypatch.setattr(stacks, name, less)
    together = project(aligned, unaligned, batch, backend="torch")
    for index, expected in zip((0, 12, 13, 14, -1), alone, strict=True):
        assert torch.equal(together.projected[index], expected.projected[0])
        assert torch.equal(together.squared_norm, expected.squared_norm)


def test_no_more_at_once_than_keeps_the_bits() -> None:
    """Where a library sums otherwise from some width on, that width is found, and nothing wider is tried."""
    alone, tried = torch.ones(stacks.LANES, 3), []

    def product(width: int) -> torch.Tensor:
        tried.append(width)
        return torch.full((width, 3), 1.0 if width < WIDE else 1.0000001)

    assert stacks._widest(WIDE, alone, product) == 2 * NARROW
    assert tried == [NARROW, 2 * NARROW, WIDE]
    assert stacks._widest(NARROW, alone, product) == NARROW
    assert stacks._widest(WIDE, alone + 1, product) == 0


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize(("rows", "cols", "transposed"), [(40, 24, False), (5000, 150, False), (700, 900, True)])
def test_products_have_the_strides_of_their_shape(rows: int, cols: int, transposed: bool, count: int) -> None:
    """A single column's could be a row's, too: what sums it next, as an effect does, would round another way."""
    aligned, unaligned = (w.bfloat16() for w in weights(3, rows, cols, transposed=transposed))
    products, _ = tiles.products(aligned, unaligned, factors(4, rows, [1, 16, 5][:count] * (1 + count // 3)))
    assert {z.stride() == (z.shape[1], 1) for z in products} == {True}
