"""Safe Delta on what the authors' code computed: single weights, and whole models on its own calibration matrices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from safeshard.kernels.backend import Backend
from safeshard.kernels.calibrated.factor import safety_factor
from safeshard.kernels.safedelta.compensation import Selection, safe_delta_dense

GOLDENS = Path(__file__).parents[1] / "goldens"
LINEAR = 5e-6  # relative to the change's norm
MODEL = 1e-5


def written(aligned: Tensor, tuned: Tensor, mask: Tensor, delta: Tensor) -> Tensor:
    return torch.where(mask, tuned, aligned + delta).double()


def error(result: Tensor, expected: Tensor, aligned: Tensor) -> float:
    return float((result - expected.double()).norm() / (expected.double() - aligned.double()).norm())


@pytest.mark.parametrize("name", ["one-block", "three-blocks", "ragged-dead-columns"])
def test_single_weights(backend: Backend, device: str, name: str) -> None:
    with safe_open(GOLDENS / f"linear/{name}.safetensors", "pt", device=device) as file:
        options, t = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    result = safe_delta_dense(
        t["finetuned"] - t["aligned"], safety_factor(t["hessian"], float(options["percdamp"])), float(options["s"]),
        block_size=int(options["block_size"]), sub_block=int(options["sub_block"]), backend=backend,
    )  # fmt: skip
    assert torch.equal(result.mask, t["expected"] == t["finetuned"])
    assert (
        error(written(t["aligned"], t["finetuned"], result.mask, result.delta), t["expected"], t["aligned"]) <= LINEAR
    )


def modules(model: str, device: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Every decoder linear: its name, aligned and fine-tuned weight, Gram, and the published result."""
    files = ("aligned/model", "finetuned/model", "expected/safedelta-hessians", "expected/safedelta")
    aligned, tuned, grams, expected = (load_file(GOLDENS / model / f"{f}.safetensors", device=device) for f in files)
    for name, gram in grams.items():
        weight = f"{name}.weight"
        yield name, aligned[weight].float(), tuned[weight].float(), gram, expected[weight]


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
def test_whole_models(backend: Backend, device: str, model: str) -> None:
    options = json.loads((GOLDENS / model / "expected/safedelta.json").read_text())
    seen = 0
    for name, aligned, tuned, gram, expected in modules(model, device):
        result = safe_delta_dense(
            tuned - aligned, safety_factor(gram, options["percdamp"]), options["s"], block_size=options["blocksize"],
            sub_block=options["sub_block"], backend=backend,
        )  # fmt: skip
        new = written(aligned, tuned, result.mask, result.delta)
        assert torch.equal(new == tuned.double(), expected == tuned), name
        assert error(new, expected, aligned) <= MODEL, name
        seen += 1
    assert seen >= 14


@pytest.mark.parametrize("model", ["llama", "Qwen2"])
@pytest.mark.parametrize("selection", ["block", "row"])
def test_compensation_lowers_the_output_error(device: str, model: str, selection: Selection) -> None:
    """|X change|_F^2 = tr(change H change^T) of every weight, against reverting the same entries."""
    options = json.loads((GOLDENS / model / "expected/safedelta.json").read_text())
    for name, aligned, tuned, gram, _ in modules(model, device):
        factor, errors = safety_factor(gram, options["percdamp"]), []
        for compensate in (True, False):
            result = safe_delta_dense(tuned - aligned, factor, options["s"], selection=selection, compensate=compensate)
            change = result.delta.double()
            errors.append(((change @ gram.double()) * change).sum().item())
        assert 0 < errors[0] < errors[1], name
