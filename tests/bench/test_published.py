"""The published formulations, which only measurements run, give what the kernels give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safeshard.bench import kernels, published, rows
from safeshard.kernels.calibrated.factor import safety_factor
from safeshard.kernels.gate import lora_gate
from safeshard.kernels.safedelta.compensation import safe_delta_dense


def test_they_equal_the_kernels() -> None:
    torch.manual_seed(0)
    v, w, a, b = torch.randn(40, 64), torch.randn(40, 64), torch.randn(4, 64), torch.randn(40, 4)
    [gate] = lora_gate(v, w, [(a, b)])
    torch.testing.assert_close(published.gate(v, w, a, b).double(), gate.cosine, rtol=0, atol=1e-5)
    torch.testing.assert_close(published.projection_matrix(v, w) @ b, gate.projected, rtol=1e-4, atol=1e-4)
    gram = published.gram(torch.randn(200, 64))
    factor = safety_factor(gram)
    torch.testing.assert_close(published.factor(gram), factor.u, rtol=1e-3, atol=1e-5)
    delta = torch.randn(40, 64) * 0.01
    for strength in (1.0, 100.0):
        ours = safe_delta_dense(delta, factor, strength, block_size=32)
        theirs, mask = published.safe_delta(delta, factor.u, strength, block_size=32)
        assert torch.equal(mask, ours.mask)
        assert 0 < mask.sum() < mask.numel()
        torch.testing.assert_close(theirs, ours.delta, rtol=1e-4, atol=1e-7)


def test_every_operation_makes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "timings", lambda function, device: [(function(), 1.0)[1]])
    threads = torch.get_num_threads()
    kernels.run(kernels.OPERATIONS, "llama-tiny", [4], [1, 2], "cpu", limit=60)
    torch.set_num_threads(threads)
    made = [row for row in rows.read("kernels") if row["ceiling"]]
    assert {row["what"] for row in made} == set(kernels.OPERATIONS)
    assert {row["backend"] for row in made} == {"torch", "published"}
    assert all(row["share_of_ceiling"] and row["GB_per_s"] and row["TFLOP_per_s"] for row in made)


@pytest.mark.parametrize("operation", ["compensation", "row"])
def test_compensation_is_timed_where_it_does_all_its_work(operation: str) -> None:
    [case] = [c for c in kernels.cases([operation], "llama-tiny", [], []) if (c.rows, c.columns) == (64, 176)]
    runs = kernels.backends(case, "cpu")
    masks = [result.mask if backend == "torch" else result[1] for backend in runs for result in [runs[backend]()]]
    for mask in masks:
        assert mask.float().mean() == pytest.approx(kernels.KEPT, abs=0.01)
