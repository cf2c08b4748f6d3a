"""Folders that hold something else than was asked for: the message names what lies there, and what takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safeshard.manifests import RequestError
from safeshard.manifests.errors import Offence
from safeshard.streamer import safemerge, scale
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.sources import open_source

STATE = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"]


@pytest.fixture
def base(world: Any) -> Path:
    folder: Path = world.checkpoint("chat", world.llama(1, seed=1))
    return folder


def refused(base: Path, **given: Path) -> Offence:
    with pytest.raises(RequestError) as error:
        scale(aligned=base, **given, factor=0.5, output=base.parent / "written", quiet=True)
    (offence,) = error.value.offences
    return offence


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_an_adapter_one_level_down(world: Any, base: Path) -> None:
    """PEFT's folder of a named adapter, and a Trainer's checkpoints: the last by number is proposed."""
    folder = touch(world.root / "run", *STATE)
    for name in ("checkpoint-400", "checkpoint-1200"):
        world.adapter(f"run/{name}", world.llama(1))
    offence = refused(base, adapter=folder)
    assert offence.got == "no adapter but in checkpoint-400, checkpoint-1200"
    assert offence.remedy == f"name one of them: {folder}/checkpoint-1200"
    offence = refused(base, finetuned=folder)
    assert "PEFT adapters in checkpoint-400" in offence.got
    assert offence.remedy == f"give one of them as an adapter: --adapter {folder}/checkpoint-1200"


def test_checkpoints_one_level_down(world: Any, base: Path) -> None:
    folder = touch(world.root / "full")
    world.checkpoint("full/checkpoint-500", world.llama(1, seed=2))
    offence = refused(base, finetuned=folder)
    assert offence.got == "no weights but in checkpoint-500"
    assert offence.remedy == f"name one of them: {folder}/checkpoint-500"
    assert "--finetuned" in refused(base, adapter=folder).remedy


def test_each_kind_given_as_the_other(world: Any, base: Path) -> None:
    adapter, full = world.adapter("a", world.llama(1)), world.checkpoint("f", world.llama(1, seed=2))
    assert refused(base, finetuned=adapter).remedy == f"give it as an adapter: --adapter {adapter}"
    assert refused(base, adapter=full).remedy == f"give it as --finetuned {full}"


def test_a_safe_one_is_named_by_its_own_option(world: Any, base: Path) -> None:
    adapter, full = world.adapter("a", world.llama(1)), world.checkpoint("f", world.llama(1, seed=2))
    gate = {"aligned": base, "unaligned": world.checkpoint("u", world.llama(1, seed=3)), "output": base.parent / "out"}
    with pytest.raises(RequestError) as error:
        safemerge(**gate, finetuned=full, safe=adapter, quiet=True)
    assert [o.remedy for o in error.value.offences] == [f"give it as an adapter: --safe-adapter {adapter}"]
    with pytest.raises(RequestError) as error:
        safemerge(**gate, adapter=adapter, safe_adapter=full, quiet=True)
    assert [o.remedy for o in error.value.offences] == [f"give it as --safe {full}"]


def test_a_merged_model_that_keeps_its_adapter_config(world: Any, base: Path) -> None:
    """axolotl's output folder: adapter_config.json beside merged shards, adapters in checkpoint-N."""
    folder = world.checkpoint("out", world.llama(1), 2)
    shutil.copy(world.adapter("out/checkpoint-400", world.llama(1)) / "adapter_config.json", folder)
    offence = refused(base, adapter=folder)
    assert offence.got == "a full checkpoint, and PEFT adapters in checkpoint-400"
    assert f"--finetuned {folder}" in offence.remedy
    assert f"{folder}/checkpoint-400" in offence.remedy


def test_a_file_in_place_of_its_folder(world: Any, base: Path) -> None:
    file = world.adapter("a", world.llama(1)) / "adapter_model.safetensors"
    assert refused(base, adapter=file).remedy == f"name its folder: {file.parent}"


def test_the_state_of_a_training_is_no_pickled_model(world: Any, base: Path) -> None:
    offence = refused(base, finetuned=touch(world.root / "state", *STATE))
    assert "a training's state without weights" in offence.got
    zero = touch(world.root / "zero", "latest", "zero_to_fp32.py", *STATE)
    assert "zero_to_fp32.py" in refused(base, finetuned=zero).remedy
    pickled = touch(world.root / "pickled", "pytorch_model.bin", *STATE)
    assert refused(base, finetuned=pickled).got == "a pickle checkpoint (pytorch_model.bin)"


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


@pytest.mark.parametrize("shards", [2, 3])
def test_headers_stand_in_for_a_missing_index(world: Any, base: Path, shards: int) -> None:
    """The same bytes as with it, and a note."""
    tuned = world.checkpoint("tuned", world.llama(1, seed=2), shards)
    options = {"aligned": base, "finetuned": tuned, "factor": 0.5, "quiet": True}
    scale(**options, output=world.root / "with")
    (tuned / INDEX).unlink()
    result = scale(**options, output=world.root / "without")
    files = [load_file(world.root / name / "model.safetensors") for name in ("with", "without")]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][name].equal(files[1][name]) for name in files[0])
    assert result.manifest is not None
    assert any(f"{shards} shards stand in" in f.why for f in result.manifest.fallbacks)


def test_shards_that_are_no_whole_set_are_refused(world: Any, base: Path) -> None:
    tuned = world.checkpoint("tuned", world.llama(1, seed=2), 3)
    (tuned / INDEX).unlink()
    (tuned / "model-00002-of-00003.safetensors").rename(world.root / "aside.safetensors")
    assert refused(base, finetuned=tuned).got == "2 of 3 shards without an index"
    (world.root / "aside.safetensors").rename(tuned / "model-00002-of-00003.safetensors")
    world.checkpoint("two", world.llama(1), 2)
    for path in (world.root / "two").glob("*.safetensors"):
        shutil.copy(path, tuned)
    assert "several without an index" in refused(base, finetuned=tuned).got


def test_an_index_may_name_what_no_one_builds(world: Any) -> None:
    """Layers for multi-token prediction that a shard lacks, or that the index lacks; anything else is refused."""
    folder = world.checkpoint("c", world.llama(1), 2, num_hidden_layers=1)
    index = index_of(folder)
    index["weight_map"]["mtp.fc.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint = open_checkpoint(open_source(folder))
    assert "mtp.fc.weight" not in checkpoint.tensors
    assert "1 tensors that transformers never builds" in checkpoint.index_note
    index["weight_map"]["model.layers.0.mlp.gone.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(RequestError, match=r"mlp\.gone"):
        open_checkpoint(open_source(folder))


@pytest.mark.parametrize(
    ("file", "got", "remedy"),
    [
        ("model.gguf", "GGUF, llama.cpp's format (model.gguf)", "in safetensors"),
        ("model.onnx", "an ONNX export (model.onnx)", "in safetensors"),
        ("__0_0.distcp", "a distributed checkpoint (__0_0.distcp)", "accelerate merge-weights"),
        ("tf_model.h5", "Keras or TensorFlow weights (tf_model.h5)", "from_tf=True"),
    ],
)
def test_other_formats_are_named(base: Path, file: str, got: str, remedy: str) -> None:
    folder = touch(base.parent / "other", "config.json", file)
    for role in ("finetuned", "adapter"):
        offence = refused(base, **{role: folder})
        assert offence.got == got
        assert remedy in offence.remedy


def test_a_gguf_file_is_no_folder(base: Path) -> None:
    file = touch(base.parent / "other", "model.gguf") / "model.gguf"
    offence = refused(base, finetuned=file)
    assert (offence.got, offence.remedy) == ("a GGUF file", "use the model that it was made from")


def test_an_adapter_of_another_library(base: Path) -> None:
    offence = refused(base, adapter=touch(base.parent / "comfy", "pytorch_lora_weights.safetensors"))
    assert offence.got == "pytorch_lora_weights.safetensors, which is no file of PEFT's"
