"""Memory that a thread keeps: the same where it is asked for again, another for another name or thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from safeshard.kernels.alignment import tiles
from safeshard.kernels.alignment.coded import Coded
from safeshard.kernels.ground.scratch import MOST_BYTES, scratch

CPU = torch.device("cpu")


def test_it_is_kept_by_name_and_thread() -> None:
    first = scratch("test", 1000, torch.float32, CPU)
    assert scratch("test", 500, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert scratch("test", 2000, torch.int16, CPU).data_ptr() == first.data_ptr()
    assert scratch("another", 1000, torch.float32, CPU).data_ptr() != first.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(scratch, "test", 1000, torch.float32, CPU).result()
    assert theirs.data_ptr() != first.data_ptr()


def test_it_grows_and_what_is_large_is_not_kept() -> None:
    small = scratch("growing", 10, torch.float32, CPU)
    grown = scratch("growing", 1000, torch.float32, CPU)
    assert (len(small), len(grown), grown.dtype) == (10, 1000, torch.float32)
    assert scratch("growing", 1000, torch.float32, CPU).data_ptr() == grown.data_ptr()
    large = scratch("growing", MOST_BYTES, torch.float32, CPU)
    assert len(large) == MOST_BYTES
    assert scratch("growing", 1000, torch.float32, CPU).data_ptr() == grown.data_ptr()


def test_a_weight_after_another_has_its_own_products() -> None:
    """Of what another weight, larger or smaller, left in this thread's memory nothing is met again."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> Coded:
        codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8, generator=generator)
        return Coded("e4m3", codes, torch.rand((rows // 128, columns // 128), generator=generator) + 0.5, (128, 128))

    shapes = ((768, 1024), (2048, 384), (768, 1024))
    operands = [(weight(*shape), weight(*shape), torch.randn((shape[0], 16), generator=generator)) for shape in shapes]
    together = [tiles.products(ours, theirs, [b]) for ours, theirs, b in operands]
    for (ours, theirs, b), (products, norm) in zip(operands, together, strict=True):
        with ThreadPoolExecutor(1) as pool:  # whose memory is new
            (alone,), alone_norm = pool.submit(tiles.products, ours, theirs, [b]).result()
        assert torch.equal(products[0], alone)
        assert torch.equal(norm, alone_norm)
        v = (ours.whole() - theirs.whole()).double()
        exact = v @ (v.T @ b.double())
        assert float((products[0] - exact).norm()) < 1e-5 * float(exact.norm())
