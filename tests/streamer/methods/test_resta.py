"""RESTA: the fine-tuned weights plus gamma times what alignment added, against the plain formula in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safeshard.manifests.errors import RequestError
from safeshard.manifests.schema import load
from safeshard.streamer import resta, verify
from safeshard.streamer.cli.app import main

LAYERS = "model.layers."


@pytest.fixture
def inputs(world: Any) -> dict[str, Path]:
    paths: dict[str, Path] = world.trio(shards=2)
    aligned = world.llama(seed=1)
    generator = torch.Generator().manual_seed(7)
    finetuned = {
        name: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) for name, t in aligned.items()
    }
    return {
        "aligned": paths["aligned"], "unaligned": paths["unaligned"], "adapter": paths["adapter"],
        "finetuned": world.checkpoint("finetuned", finetuned),
    }  # fmt: skip


def options(inputs: dict[str, Path], kind: str) -> dict[str, Any]:
    return {role: inputs[role] for role in ("aligned", "unaligned", kind)} | {"quiet": True}


def tuned_weights(inputs: dict[str, Path], kind: str, tensors_of: Any) -> dict[str, Tensor]:
    """fp64."""
    if kind == "finetuned":
        return {name: t.double() for name, t in tensors_of(inputs[kind]).items()}
    weights = {name: t.double() for name, t in tensors_of(inputs["aligned"]).items()}
    pairs = load_file(inputs[kind] / "adapter_model.safetensors")
    for name, b in pairs.items():
        if ".lora_B." in name:
            module = name.removeprefix("base_model.model.").replace("lora_B.", "")
            weights[module] += 2 * b.double() @ pairs[name.replace("lora_B", "lora_A")].double()  # alpha / r is 2
    return weights


@pytest.mark.parametrize("kind", ["adapter", "finetuned"])
@pytest.mark.parametrize("gamma", [0.5, -1.25])
def test_written_weights_are_the_plain_formula(
    world: Any, inputs: dict[str, Path], load_tensors: Any, kind: str, gamma: float
) -> None:
    resta(**options(inputs, kind), output=world.root / "out", gamma=gamma, dtype="float32")
    aligned, unaligned = (load_tensors(inputs[role]) for role in ("aligned", "unaligned"))
    written, tuned = load_tensors(world.root / "out"), tuned_weights(inputs, kind, load_tensors)
    assert written.keys() == aligned.keys()
    for name, weight in written.items():
        expected = tuned[name]
        if "_proj." in name:
            expected = expected + gamma * (aligned[name].double() - unaligned[name].double())
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    manifest = load(world.root / "out")
    assert {module.decision for module in manifest.modules} == {"merged"}
    assert {module.weights for module in manifest.modules} == {(1.0, gamma)}
    assert all(module.effect is not None for module in manifest.modules)
    assert verify(world.root / "out", recompute=3) == []


@pytest.mark.parametrize("kind", ["adapter", "finetuned"])
def test_gamma_0_gives_the_fine_tuned_model(world: Any, inputs: dict[str, Path], load_tensors: Any, kind: str) -> None:
    resta(**options(inputs, kind), output=world.root / "out", gamma=0.0)
    written, tuned = load_tensors(world.root / "out"), tuned_weights(inputs, kind, load_tensors)
    for name, weight in written.items():
        torch.testing.assert_close(weight, tuned[name].to(weight.dtype), rtol=0.01 if kind == "adapter" else 0, atol=0)


def test_dare_keeps_a_fraction_and_divides_by_it(world: Any, inputs: dict[str, Path], load_tensors: Any) -> None:
    given = options(inputs, "finetuned") | {"dtype": "float32", "density": 0.3}
    for name, seed in (("out", 1), ("again", 1), ("other", 2)):
        resta(**given, seed=seed, output=world.root / name)
    aligned, unaligned, tuned, out, again, other = (
        load_tensors(place)
        for place in (*(inputs[r] for r in ("aligned", "unaligned", "finetuned")),
                      *(world.root / n for n in ("out", "again", "other")))
    )  # fmt: skip
    kept, count = 0, 0
    for name in (n for n in out if "_proj." in n):
        assert torch.equal(out[name], again[name])
        assert not torch.equal(out[name], other[name])
        vector = aligned[name].double() - unaligned[name].double()
        added = out[name].double() - tuned[name].double()
        rescaled, dropped = (added - vector / 0.3).abs() < 1e-5, added == 0
        assert bool((rescaled | dropped).all())
        kept, count = kept + int((~dropped).sum()), count + added.numel()
    assert abs(kept / count - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5


def test_a_safety_vector_of_another_shape_is_refused(world: Any, inputs: dict[str, Path], load_tensors: Any) -> None:
    tensors = load_tensors(inputs["unaligned"])
    tensors[f"{LAYERS}0.mlp.up_proj.weight"] = torch.zeros(3, 5, dtype=torch.bfloat16)
    given = options(inputs, "finetuned") | {"unaligned": world.checkpoint("smaller", tensors)}
    with pytest.raises(RequestError, match="up_proj"):
        resta(**given, output=world.root / "out")
    assert not (world.root / "out").exists()


def test_command_line_merges_an_adapter(world: Any, inputs: dict[str, Path], capsys: Any) -> None:
    arguments = [f"--{role}={inputs[role]}" for role in ("aligned", "unaligned", "adapter")]
    with pytest.raises(SystemExit) as stop:
        main(["resta", *arguments, "--gamma", "0.5", f"--output={world.root / 'out'}"])
    assert not stop.value.code
    assert "merged" in capsys.readouterr().out
    assert (world.root / "out/config.json").exists()
    assert not (world.root / "out/adapter_config.json").exists()
