"""Kernel tests run on the CPU: the torch implementations as they are, the Triton ones in Triton's interpreter.

On a machine with a GPU the kernels are compiled and run there instead. Under `make sanitize` there is none, though
torch says so: kernels are compiled, and what they were compiled to runs on the CPU.
"""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available() and not torch.backends.cuda.is_built():  # make sanitize
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]


# Session scope: Hypothesis runs many examples within one set-up of the fixtures.
@pytest.fixture(scope="session", params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation of an operation, by the name that its `backend` argument takes."""
    return str(request.param)


@pytest.fixture(scope="session")
def device() -> str:
    """Where a test's tensors go so that both backends can run on them."""
    return DEVICE
