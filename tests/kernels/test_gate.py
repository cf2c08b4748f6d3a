"""The gate against P formed densely in fp64, and against what the authors' code printed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.gate import DENSE_COLUMNS, dense_gate, lora_gate
from safeshard.kernels.projection import WEIGHT_DTYPES

GOLDENS = Path(__file__).parent.parent / "goldens"
DTYPES = st.sampled_from(WEIGHT_DTYPES)


def dense(aligned: Tensor, unaligned: Tensor, delta: Tensor) -> tuple[float, Tensor]:
    """cos(P D, D) and P = V V^T / |V|_F, by the papers' formulas in fp64."""
    v = aligned.double() - unaligned.double()
    p = v @ v.T / v.norm()
    projected = p @ delta.double()
    return torch.nn.functional.cosine_similarity(projected.flatten(), delta.double().flatten(), dim=0).item(), p


def case(
    seed: int, rows: int, cols: int, rank: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Seeded aligned, unaligned (O x I), A (r x I) and B (O x r) of the magnitudes of real checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    shapes, scales = ((rows, cols), (rows, cols), (rank, cols), (rows, rank)), (0.05, 0.005, 0.05, 0.01)
    drawn = [torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales, strict=True)]
    drawn[1] += drawn[0]
    return tuple(t.to(device, dtype) for t in drawn)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result - exact).norm() / exact.norm()).item()


def test_docstring_example(backend: Backend, device: str) -> None:
    aligned = torch.tensor([[1.0, 0], [0, 2]], device=device)
    a, b = torch.tensor([[1.0, 0]], device=device), torch.ones(2, 1, device=device)
    (gate,) = lora_gate(aligned, torch.zeros_like(aligned), [(a, b)], backend=backend)
    assert gate.cosine.item() == pytest.approx(5 / math.sqrt(17 * 2), abs=1e-15)
    assert torch.equal(gate.projected, torch.tensor([[1.0], [4.0]], device=device) / torch.tensor(5.0).sqrt().item())
    full = dense_gate(aligned, torch.zeros_like(aligned), aligned + b @ a, project=True, backend=backend)
    assert full.cosine.item() == pytest.approx(5 / math.sqrt(17 * 2), abs=1e-15)
    assert torch.equal(full.projected[:, :1], gate.projected)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(2, 130),
    cols=st.integers(2, 130),
    rank=st.integers(1, 40),
    dtype=DTYPES,
)
def test_lora_gate_matches_dense_formulas(
    backend: Backend, device: str, seed: int, rows: int, cols: int, rank: int, dtype: torch.dtype
) -> None:
    aligned, unaligned, a, b = case(seed, rows, cols, rank, device, dtype)
    (gate,) = lora_gate(aligned, unaligned, [(a, b)], backend=backend)
    cosine, p = dense(aligned, unaligned, b.double() @ a.double())
    assert gate.cosine.dtype == torch.float64
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)
    assert gate.projected.dtype == torch.float32
    assert relative_error(gate.projected, p @ b.double()) < 1e-5


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), rows=st.integers(2, 130), cols=st.integers(2, 130), dtype=DTYPES)
def test_dense_gate_matches_dense_formulas(
    backend: Backend, device: str, seed: int, rows: int, cols: int, dtype: torch.dtype
) -> None:
    aligned, unaligned, a, b = case(seed, rows, cols, 7, device, dtype)
    finetuned = (aligned.float() + b.float() @ a.float()).to(dtype)
    gate = dense_gate(aligned, unaligned, finetuned, project=True, backend=backend)
    delta = finetuned.double() - aligned.double()
    cosine, p = dense(aligned, unaligned, delta)
    if delta.norm() == 0:
        assert gate.cosine.isnan()
        return
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)
    assert gate.projected.dtype == torch.float32
    assert relative_error(gate.projected, p @ delta) < 1e-5


@pytest.mark.parametrize(("rows", "cols"), [(300, 2 * DENSE_COLUMNS + 3), (1200, DENSE_COLUMNS + 70)])
def test_dense_gate_over_several_strips(rows: int, cols: int) -> None:
    aligned, unaligned, finetuned, _ = case(3, rows, cols, rows, "cpu")
    gate = dense_gate(aligned, unaligned, finetuned, project=True, backend="torch")
    cosine, p = dense(aligned, unaligned, finetuned.double() - aligned.double())
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)
    assert relative_error(gate.projected, p @ (finetuned.double() - aligned.double())) < 1e-5
    unprojected = dense_gate(aligned, unaligned, finetuned, backend="torch")
    assert torch.equal(unprojected.cosine, gate.cosine)
    assert unprojected.projected.numel() == 0


def test_transposed_weights_give_the_same_gate(backend: Backend, device: str) -> None:
    aligned, unaligned, a, b = case(4, 90, 70, 5, device)
    cosine, p = dense(aligned, unaligned, b.double() @ a.double())
    stored = [w.T.contiguous().T for w in (aligned, unaligned)]
    (gate,) = lora_gate(*stored, [(a.T.contiguous().T, b.T.contiguous().T)], backend=backend)
    assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6)
    assert relative_error(gate.projected, p @ b.double()) < 1e-5


def test_adapter_does_not_depend_on_its_batch() -> None:
    aligned, unaligned, _, _ = case(5, 400, 300, 1, "cpu", torch.bfloat16)
    adapters = [case(seed, 400, 300, rank, "cpu")[2:] for seed, rank in enumerate((16, 3, 64, 16))]
    for adapter, together in zip(adapters, lora_gate(aligned, unaligned, adapters), strict=True):
        (alone,) = lora_gate(aligned, unaligned, [adapter])
        assert torch.equal(alone.cosine, together.cosine)
        assert torch.equal(alone.projected, together.projected)


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
def test_goldens(backend: Backend, device: str, model: str) -> None:
    aligned, unaligned, adapter = (
        load_file(GOLDENS / model / folder / f"{stem}.safetensors", device=device)
        for folder, stem in (("aligned", "model"), ("unaligned", "model"), ("ft-adapter", "adapter_model"))
    )
    expected = json.loads((GOLDENS / model / "expected/safemerge.json").read_text())["cosine_fp64"]
    assert len(expected) * 2 == len(adapter)
    for module, cosine in expected.items():
        factors = tuple(adapter[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        weight = f"{module}.weight"
        (gate,) = lora_gate(aligned[weight], unaligned[weight], [factors], backend=backend)
        assert gate.cosine.item() == pytest.approx(cosine, abs=1e-6), module


def test_safelora_golden_projections(backend: Backend, device: str) -> None:
    aligned, unaligned, adapter, expected = (
        load_file(GOLDENS / "llama" / folder / f"{stem}.safetensors", device=device)
        for folder, stem in (
            ("aligned", "model"),
            ("unaligned", "model"),
            ("ft-adapter", "adapter_model"),
            ("expected/safelora-threshold", "adapter_model"),
        )
    )
    projected = 0
    for key in (
        key for key in adapter if key.endswith("lora_B.weight") and not torch.equal(adapter[key], expected[key])
    ):
        weight = key.removeprefix("base_model.model.").replace("lora_B.", "")
        factors = adapter[key.replace("lora_B", "lora_A")], adapter[key]
        (gate,) = lora_gate(aligned[weight], unaligned[weight], [factors], backend=backend)
        assert relative_error(gate.projected, expected[key]) < 1e-5, key
        projected += 1
    assert projected > 0


def test_undefined_cosines_are_nan(backend: Backend, device: str) -> None:
    aligned, unaligned, a, b = case(6, 40, 30, 4, device)
    zero_delta, zero_v = (
        lora_gate(aligned, unaligned, [(a, torch.zeros_like(b))], backend=backend)[0],
        lora_gate(aligned, aligned, [(a, b)], backend=backend)[0],
    )
    dense_zero_delta = dense_gate(aligned, unaligned, aligned, project=True, backend=backend)
    dense_zero_v = dense_gate(aligned, aligned, unaligned, project=True, backend=backend)
    for gate in (zero_delta, zero_v, dense_zero_delta, dense_zero_v):
        assert gate.cosine.isnan()
        assert (gate.projected == 0).all()


def test_delta_outside_the_subspace_has_cosine_zero(backend: Backend, device: str) -> None:
    aligned, b = torch.zeros(4, 3, device=device), torch.zeros(4, 1, device=device)
    aligned[0], b[2] = 1, 1
    a = torch.ones(1, 3, device=device)
    (gate,) = lora_gate(aligned, torch.zeros_like(aligned), [(a, b)], backend=backend)
    assert gate.cosine.item() == 0
    assert dense_gate(aligned, torch.zeros_like(aligned), aligned + b @ a, backend=backend).cosine.item() == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", range(4))
def test_not_finite_input_gives_nan(backend: Backend, device: str, place: int, value: float) -> None:
    tensors = case(7, 40, 30, 4, device)
    tensors[place][3, 2] = value
    aligned, unaligned, a, b = tensors
    assert lora_gate(aligned, unaligned, [(a, b)], backend=backend)[0].cosine.isnan()
    assert dense_gate(aligned, unaligned, aligned + b @ a, backend=backend).cosine.isnan()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(4, 2), "A must be 2 x 3"),
        (torch.zeros(1, 3), torch.zeros(4, 2), "A must be 2 x 3"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 2), "float64"),
        (torch.zeros(2, 3), torch.zeros(3, 2), "must be 4 x r"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_gate(torch.zeros(4, 3), torch.zeros(4, 3), [(a, b)])


def test_finetuned_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finetuned must be \(4, 3\), got \(4, 2\)"):
        dense_gate(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 2))
