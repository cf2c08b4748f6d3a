"""Which implementation runs, decided from devices and environment alone."""

from __future__ import annotations

import pytest
import torch

from safeshard.kernels.backend import resolve

CPU = torch.empty(0)
META = torch.empty(0, device="meta")


def test_auto_is_torch_on_the_cpu() -> None:
    assert resolve("auto", CPU, CPU) == "torch"


def test_explicit_torch_runs_anywhere() -> None:
    assert resolve("torch", META) == "torch"


def test_explicit_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve("triton", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_is_triton_on_cuda() -> None:
    assert resolve("auto", torch.empty(0, device="cuda")) == "triton"


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton'"):
        resolve("cutlass", CPU)  # type: ignore[arg-type]


def test_tensors_of_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        resolve("auto", CPU, META)
