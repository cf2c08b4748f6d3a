"""Which implementation runs, decided from devices and environment alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import device
from triton.backends.compiler import GPUTarget

from safeshard.kernels.backend import launch, resolve, upload

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


def test_an_empty_grid_is_no_launch() -> None:
    launch(None, (3, 0), CPU)


class Kernel:
    """Notes the grid, the arguments and the settings of its launches."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **settings: self.launched.append((grid, args, settings))


def test_a_launch_passes_everything_on() -> None:
    kernel = Kernel()
    launch(kernel, (3, 2), 5, CPU, BLOCK=16)
    assert kernel.launched == [((3, 2), (5, CPU), {"BLOCK": 16})]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (("cuda", 75, 32), False),
        (("cuda", 80, 32), True),
        (("cuda", 90, 32), True),
        (("cuda", 120, 32), True),
        (("hip", "gfx942", 64), True),
        (("hip", "gfx1100", 32), True),
        (("hip", "gfx906", 64), False),
        (("hip", "gfx1030", 32), False),
    ],
)
def test_auto_is_triton_where_the_kernels_compile(architecture: tuple[str, Any, int], expected: bool) -> None:
    with device(GPUTarget(*architecture)):
        assert resolve("auto", torch.empty(0, device="cuda")) == ("triton" if expected else "torch")


def test_an_upload_is_a_copy_on_the_cpu_too() -> None:
    assert torch.equal(upload(torch.arange(3), torch.device("cpu")), torch.arange(3))
