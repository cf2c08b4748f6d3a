"""Calibration towards a device, seen on one that is not there (`tests/kernels/standin.py`)."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from standin import DEVICE, stand_in
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from safeshard.manifests.errors import RunError
from safeshard.streamer.calibration.forward import calibrate
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.calibration.model.ahead import Ahead, fresh

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
LENGTHS = (5, 11, 3, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    made.save_pretrained(folder)
    return folder, {name: tensor.detach().clone() for name, tensor in made.state_dict().items()}


def run(
    model: tuple[Path, dict[str, Tensor]],
    device: torch.device,
    weights: dict[str, Tensor] | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Each layer's Grams, on the CPU."""
    folder, own = model
    given = weights or own

    def load(name: str, room: Any = fresh) -> Tensor:
        tensor = given[name]
        return room(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]
    options = {"budget_bytes": 1 << 30, "key": "a", "saved": HiddenStates([folder]), "batch_tokens": 16} | options
    layers = calibrate(folder, load, given.keys(), tokens, device=device, dtype=torch.float32, **options)
    return [{name: gram.cpu() for name, gram in layer.grams.items()} for layer in layers]


@pytest.mark.parametrize("room", [0, 1 << 20])  # for no weights, for a layer's
def test_grams_are_those_of_a_cpu(model: tuple[Path, dict[str, Tensor]], room: int) -> None:
    expected = run(model, CPU)
    with stand_in():
        grams = run(model, DEVICE, ahead_bytes=room)
    assert [layer.keys() for layer in grams] == [layer.keys() for layer in expected]
    for own, other in zip(grams, expected, strict=True):
        for name, gram in own.items():
            torch.testing.assert_close(gram, other[name], rtol=1e-4, atol=1e-4)


def test_a_layer_waits_as_often_whatever_the_batches(model: tuple[Path, dict[str, Tensor]]) -> None:
    """For its weights, at its end, and for whether its Grams are finite; not for a batch."""
    found = []
    for tokens in (64, 12):
        with stand_in() as device:
            run(model, DEVICE, ahead_bytes=1 << 20, batch_tokens=tokens)
            kinds = Counter(wait.partition(":")[0].removesuffix(".py") for wait in device.waits if "forward" in wait)
            found.append(sum(kinds.values()))
            assert sum("collector" in wait for wait in device.waits) <= 3, device.waits
    assert found[0] <= 3 * 4 + 8, found
    # Batches come with a few waits where they are embedded, once for the model, and none in its layers.
    assert found[1] - found[0] <= 4 * 3, found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_a_gram_that_is_not_finite_is_told_at_the_layers_end(model: tuple[Path, dict[str, Tensor]]) -> None:
    _, own = model
    weights = own | {"model.layers.1.input_layernorm.weight": torch.full((32,), 1e30)}
    with stand_in(), pytest.raises(RunError, match=r"layers\.1\..*not finite from calibration samples 2, 0 "):
        run(model, DEVICE, weights)


def test_a_device_without_memory_is_an_error_with_a_remedy(
    model: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("safeshard.streamer.calibration.gram_collector.gram_kernel.accumulate", full)
    with stand_in(), pytest.raises(RunError, match=r"layers\.0: the device is out of memory: CUDA out of memory"):
        run(model, DEVICE)


def test_weights_are_read_ahead_into_memory_that_is_used_again() -> None:
    threads: list[str] = []

    def load(name: str, room: Any = fresh) -> Tensor:
        threads.append(threading.current_thread().name)
        return room(100).fill_(ord(name))

    with stand_in() as device:
        ahead = Ahead(load, 256)
        assert list(device.registered.values()) == [256]
        begin = next(iter(device.registered))
        with ahead.reading():
            for names in ("abc", "de"):
                ahead.announce(names)
                tensors = [ahead(name) for name in names]
                assert [int(tensor[0]) for tensor in tensors] == [ord(name) for name in names]
                places = [tensor.data_ptr() - begin for tensor in tensors]
                assert places[:2] == [0, 128]
                assert all(not 0 <= place < 256 for place in places[2:])  # no room: memory of its own
            assert int(ahead("z")[0]) == ord("z")
    assert [name.startswith("weights") for name in threads] == [True] * 5 + [False]
