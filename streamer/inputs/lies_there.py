"""What lies in a folder that is not what was asked for, and the option or folder that takes it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from safeshard.manifests.errors import Offence
from safeshard.streamer.sources import LocalSource, Source

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_STEM = "adapter_model"
ADAPTER = f"{ADAPTER_STEM}.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MOST_FOLDERS = 1000
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_DIGITS = re.compile(r"([0-9]+)")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# What a Trainer or DeepSpeed keeps to go on with training: no model's weights.
_STATE = re.compile(
    r"optimizer.*|scheduler.*|rng_state.*|random_states.*|scaler\..*|training_args\.bin|trainer_state\.json"
    r"|.*optim_states\.pt|.*model_states\.pt|sampler.*|dl_.*|latest|zero_to_fp32\.py"
)
# Other formats of weights: what they are, and what to do.
_OTHERS = {
    ".gguf": ("GGUF, llama.cpp's format", "use the model that it was made from, in safetensors"),
    ".onnx": ("an ONNX export", "use the model that it was made from, in safetensors"),
    ".h5": ("Keras or TensorFlow weights", "load it with from_tf=True and save_pretrained"),
    ".msgpack": ("Flax weights", "load it with from_flax=True and save_pretrained"),
    ".distcp": ("a distributed checkpoint", "gather it first: accelerate merge-weights FOLDER OUT"),
}
_GATHER = (
    "gather the shards first (python zero_to_fp32.py FOLDER OUT --safe_serialization), or train with "
    "stage3_gather_16bit_weights_on_model_save"
)


def shard_sets(names: list[str]) -> dict[tuple[str, int], dict[int, str]]:
    """Files named `STEM-00001-of-00003.safetensors` by stem and count: number -> file."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        if (match := _SHARD.fullmatch(name)) and len(match["count"]) < 10 and len(match["number"]) < 10:
            sets.setdefault((match["stem"], int(match["count"])), {})[int(match["number"])] = name
    return sets


def pickle_in(names: list[str]) -> str | None:
    """A file that holds a model's weights as a pickle; not what a Trainer keeps beside them."""
    return next((n for n in names if PurePosixPath(n).suffix in _PICKLES and not _STATE.fullmatch(n)), None)


def of_a_safe_one(offence: Offence) -> Offence:
    """The offence of a safe model or adapter, which has options of its own."""
    remedy = re.sub(r"--finetuned\b", "--safe", re.sub(r"--adapter\b", "--safe-adapter", offence.remedy))
    return replace(offence, remedy=remedy)


def instead_of_checkpoint(source: Source) -> tuple[str, str]:
    """(what lies there, what to do) in a folder without the safetensors files of a checkpoint."""
    names = sorted(source.sizes())
    inside, adapters = _folders(source)
    if ADAPTER in names or ADAPTER_CONFIG in names:
        return "a PEFT adapter", f"give it as an adapter: --adapter {source.spec}"
    if inside:
        return f"no weights but in {_listed(inside)}", f"name one of them: {source.spec}/{inside[-1]}"
    if adapters:
        remedy = f"give one of them as an adapter: --adapter {source.spec}/{adapters[-1]}"
        return f"no weights but PEFT adapters in {_listed(adapters)}", remedy
    return _pickles_or_nothing(names, "name the folder that holds the checkpoint", "a pickle checkpoint")


def instead_of_adapter(source: Source) -> tuple[str, str] | None:
    """(what lies there, what to do) in a folder without an adapter; None where nothing tells."""
    names = sorted(source.sizes())
    inside, adapters = _folders(source)
    stems = {stem for stem, _ in shard_sets(names)}
    whole = SINGLE in names or INDEX in names or bool(stems - {ADAPTER_STEM})
    if not whole and ADAPTER_STEM in stems:
        return "a sharded adapter, which PEFT does not read", "save the adapter in one file"
    named = f"name one of them: {source.spec}/{adapters[-1]}" if adapters else ""
    if whole:
        got = "a full checkpoint" + (f", and PEFT adapters in {_listed(adapters)}" if adapters else "")
        return got, f"give it as --finetuned {source.spec}" + (f", or {named}" if named else "")
    if adapters:
        return f"no adapter but in {_listed(adapters)}", named
    if inside:
        got, remedy = f"full checkpoints in {_listed(inside)}", f"give one as --finetuned {source.spec}/{inside[-1]}"
        return got, remedy
    others = any(PurePosixPath(name).suffix in {*_OTHERS, ".safetensors"} for name in names)
    if others or any(_STATE.fullmatch(name) for name in names):
        return _pickles_or_nothing(names, "name the folder of a PEFT adapter", "a pickle")
    return None


def _pickles_or_nothing(names: list[str], remedy: str, what: str) -> tuple[str, str]:
    state = [name for name in names if _STATE.fullmatch(name)]
    if pickle := pickle_in(names):
        return f"{what} ({pickle})", "convert it to safetensors (save_pretrained does); pickles are never opened"
    if state:
        sharded = any(name.endswith("_states.pt") or name in ("latest", "zero_to_fp32.py") for name in state)
        return f"a training's state without weights ({_listed(state)})", _GATHER if sharded else remedy
    for name in names:
        if (known := _OTHERS.get(PurePosixPath(name).suffix)) is not None:
            return f"{known[0]} ({name})", known[1]
    if other := next((name for name in names if name.endswith(".safetensors")), None):
        return f"{other}, which is no file of PEFT's", remedy
    return "no safetensors file", remedy


def _folders(source: Source) -> tuple[list[str], list[str]]:
    """The folders one level down that hold a checkpoint, and those that hold an adapter; of local sources alone."""
    checkpoints: list[str] = []
    adapters: list[str] = []
    if isinstance(source, LocalSource):
        try:
            folders = [path for path in source.folder.iterdir() if path.is_dir() and not path.is_symlink()]
        except OSError:
            return [], []
        for folder in sorted(folders[:MOST_FOLDERS], key=lambda path: _by_number(path.name)):
            names = _names(folder)
            if ADAPTER in names or (ADAPTER_CONFIG in names and "adapter_model.bin" in names):
                adapters.append(folder.name)
            elif SINGLE in names or INDEX in names or shard_sets(names):
                checkpoints.append(folder.name)
    return checkpoints, adapters


def _by_number(name: str) -> list[tuple[int, str]]:
    """checkpoint-400 before checkpoint-1200."""
    return [(int(part[:18]), "") if part.isascii() and part.isdigit() else (0, part) for part in _DIGITS.split(name)]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
