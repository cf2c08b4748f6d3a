"""V (V^T B) and |V|_F^2 against the same formulas written out in fp64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safeshard.kernels.alignment.tiles import MIN_TILE_ROWS, TILE_ELEMENTS
from safeshard.kernels.backend import Backend
from safeshard.kernels.projection import WEIGHT_DTYPES, project

DTYPES = st.sampled_from(WEIGHT_DTYPES)


def weights(seed: int, rows: int, cols: int, *, transposed: bool = False, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A seeded fp32 pair (aligned, unaligned), O x I, that differs by about a hundredth."""
    generator = torch.Generator().manual_seed(seed)
    shape = (cols, rows) if transposed else (rows, cols)
    unaligned = torch.randn(shape, generator=generator)
    aligned = unaligned + 0.01 * torch.randn(shape, generator=generator)
    pair = aligned.to(device), unaligned.to(device)
    return (pair[0].T, pair[1].T) if transposed else pair


def factors(seed: int, rows: int, ranks: list[int], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, rank, generator=generator).to(device) for rank in ranks]


def relative_errors(aligned: Tensor, unaligned: Tensor, given_factors: list[Tensor], backend: Backend) -> list[float]:
    """Of each product, as a share of |V|^2 |B|, and of the squared norm."""
    v = aligned.double() - unaligned.double()
    projected, squared_norm = project(aligned, unaligned, given_factors, backend=backend)
    errors = [((squared_norm - v.square().sum()) / v.square().sum()).abs().item()]
    for result, factor in zip(projected, given_factors, strict=True):
        assert result.dtype == torch.float32
        exact = v @ (v.T @ factor.double())
        errors.append(((result - exact).norm() / (v.norm().square() * factor.double().norm())).item())
    assert squared_norm.dtype == torch.float64
    assert squared_norm.ndim == 0
    return errors


def test_docstring_example(backend: Backend, device: str) -> None:
    aligned = torch.tensor([[1.0, 0], [0, 2]], device=device)
    factor = torch.ones(2, 1, device=device)
    projected, squared_norm = project(aligned, torch.zeros_like(aligned), [factor], backend=backend)
    assert projected[0].tolist() == [[1], [4]]
    assert squared_norm.item() == 5


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 150),
    cols=st.integers(1, 150),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtypes=st.tuples(DTYPES, DTYPES, DTYPES),
    transposed=st.tuples(st.booleans(), st.booleans()),
)
def test_matches_fp64(
    backend: Backend,
    device: str,
    seed: int,
    rows: int,
    cols: int,
    ranks: list[int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    transposed: tuple[bool, bool],
) -> None:
    aligned = weights(seed, rows, cols, transposed=transposed[0], device=device)[0].to(dtypes[0])
    unaligned = weights(seed + 1, rows, cols, transposed=transposed[1], device=device)[1].to(dtypes[1])
    given_factors = [factor.to(dtypes[2]) for factor in factors(seed, rows, ranks, device)]
    assert max(relative_errors(aligned, unaligned, given_factors, backend)) < 1e-6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1500, 700), (700, 1500), (MIN_TILE_ROWS + 1, TILE_ELEMENTS // 40)])
def test_torch_matches_fp64_over_several_tiles(rows: int, cols: int, transposed: bool) -> None:
    assert rows * cols > TILE_ELEMENTS
    aligned, unaligned = (w.bfloat16() for w in weights(0, rows, cols, transposed=transposed))
    assert max(relative_errors(aligned, unaligned, factors(1, rows, [16, 5]), "torch")) < 1e-6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1500, 700), (257, 333), (64, 2048)])
def test_factor_does_not_depend_on_its_batch(rows: int, cols: int, transposed: bool) -> None:
    aligned, unaligned = (w.bfloat16() for w in weights(2, rows, cols, transposed=transposed))
    batch = factors(3, rows, [16, 16, 1, 7, 64, 16])
    together = project(aligned, unaligned, batch, backend="torch")
    for factor, product in zip(batch, together.projected, strict=True):
        alone = project(aligned, unaligned, [factor], backend="torch")
        assert torch.equal(alone.projected[0], product)
        assert torch.equal(alone.squared_norm, together.squared_norm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_factor_does_not_depend_on_its_batch_on_a_device() -> None:
    aligned, unaligned = (w.bfloat16().cuda() for w in weights(2, 1500, 700))
    batch = [factor.cuda() for factor in factors(3, 1500, [16, 16, 1, 7, 64, 16])]
    together = project(aligned, unaligned, batch).projected
    for factor, product in zip(batch, together, strict=True):
        assert torch.equal(project(aligned, unaligned, [factor]).projected[0], product)


def test_factor_does_not_depend_on_where_it_lies() -> None:
    aligned, unaligned = weights(4, 300, 200)
    (factor,) = factors(5, 300, [9])
    (expected,) = project(aligned, unaligned, [factor], backend="torch").projected
    unaligned_memory = torch.cat([torch.zeros(1), factor.flatten()])[1:].view_as(factor)
    for same in (unaligned_memory, factor.T.contiguous().T):
        assert torch.equal(project(aligned, unaligned, [same], backend="torch").projected[0], expected)


def test_threads_do_not_disturb_each_other() -> None:
    jobs = [(*weights(seed, 900, 700), factors(seed, 900, [16])) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(lambda job: project(*job, backend="torch"), jobs))
    for job, result in zip(jobs, concurrent, strict=True):
        assert torch.equal(project(*job, backend="torch").projected[0], result.projected[0])


class LargestTensor(TorchDispatchMode):
    """Records the largest number of fp32 or fp64 elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.float32, torch.float64):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_torch_never_holds_the_difference_as_a_whole(transposed: bool) -> None:
    aligned, unaligned = (w.bfloat16() for w in weights(6, 3000, 1000, transposed=transposed))
    (factor,) = factors(7, 3000, [16])
    with LargestTensor() as largest:
        project(aligned, unaligned, [factor], backend="torch")
    assert largest.elements <= TILE_ELEMENTS


@pytest.mark.parametrize(("rows", "cols", "rank"), [(0, 5, 2), (5, 0, 2), (0, 0, 1), (5, 4, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_projects_to_nothing(
    backend: Backend, device: str, rows: int, cols: int, rank: int, transposed: bool
) -> None:
    aligned, unaligned = weights(8, rows, cols, transposed=transposed, device=device)
    projected, squared_norm = project(aligned, unaligned, factors(9, rows, [rank, 1], device), backend=backend)
    assert [tuple(z.shape) for z in projected] == [(rows, rank), (rows, 1)]
    assert all((z == 0).all() for z in projected) or rank == 0
    assert squared_norm.item() == pytest.approx((aligned.double() - unaligned.double()).square().sum().item())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, under the interpreter
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite_reaches_the_outputs(backend: Backend, device: str, value: float) -> None:
    aligned, unaligned = weights(8, 70, 50, device=device)
    aligned[30, 20] = value
    projected, squared_norm = project(aligned, unaligned, factors(9, 70, [3], device), backend=backend)
    assert not squared_norm.isfinite()
    assert not projected[0][30].isfinite().any()


@pytest.mark.parametrize(
    ("aligned", "unaligned", "given_factors", "message"),
    [
        (torch.zeros(3), torch.zeros(3), [torch.zeros(3, 1)], "2-D and of one shape"),
        (torch.zeros(3, 2), torch.zeros(2, 3), [torch.zeros(3, 1)], "2-D and of one shape"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [], "at least one factor"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [torch.zeros(2, 1)], "must be 3 x r"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [torch.zeros(3)], "must be 3 x r"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [torch.zeros(3, 1).double()], "bfloat16, float16 or float32"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2), [torch.zeros(3, 1)], "bfloat16, float16 or float32"),
    ],
)
def test_bad_operands_are_refused(
    aligned: Tensor, unaligned: Tensor, given_factors: list[Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        project(aligned, unaligned, given_factors)
