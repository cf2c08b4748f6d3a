"""Where Safe Delta's factors come from: a calibration run, layer by layer, or a folder that `calibrate` wrote."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input, InputFile
from safeshard.streamer.calibration.ahead import Room, aligned_size, fresh
from safeshard.streamer.calibration.data_files import DATA
from safeshard.streamer.calibration.forward import LayerGrams, calibrate, check_lengths
from safeshard.streamer.calibration.groups import Group
from safeshard.streamer.calibration.hidden_states import HiddenStates, UnsavedStates
from safeshard.streamer.calibration.prompts import Prompts, load_prompts
from safeshard.streamer.calibration.skeleton import Skeleton
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.read import TORCH_DTYPES
from safeshard.streamer.methods.calibrate import Sampled
from safeshard.streamer.sources import Source

BATCH_TOKENS = 4096  # part of what decides the last bits of a Gram
# What transformers reads to build a model and its tokenizer.
MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja",
)  # fmt: skip


class Calibration:
    """Factors from a calibration run of the aligned model."""

    def __init__(
        self, aligned: Checkpoint, options: Sampled, dtype: torch.dtype, roles: Sequence[str] = tuple(DATA)
    ) -> None:
        """Check model and data. `roles` are the data sets to run, as far as they are given.

        Raises:
            RequestError: the model is none that can be calibrated, or the data is refused.
        """
        self.aligned, self.options, self.dtype = aligned, options, dtype
        self.bytes_read = 0
        self._local = tempfile.TemporaryDirectory(prefix="safeshard-")
        self.folder = _model_folder(aligned.source, Path(self._local.name))
        with _named(self.folder, aligned.source):
            skeleton = Skeleton(self.folder, aligned.tensors.keys(), dtype)
            _check_shapes(aligned, skeleton)
            self._layers = {path: list(skeleton.linears(path)) for path in skeleton.layers}
            given = {role: getattr(options, DATA[role], None) for role in roles}
            fewer = "samples" not in options.model_fields_set  # a number that was asked for stays a demand
            self.prompts: dict[str, Prompts] = {
                role: load_prompts(
                    place, self.folder, samples=options.samples, max_tokens=options.max_tokens, seed=options.seed,
                    fewer=fewer, answers=role == "safe", published=role == "safe" and options.recipe is not None,
                )
                for role, place in given.items()
                if role == "safe" or place is not None
            }  # fmt: skip
            tokens = [sample for prompts in self.prompts.values() for sample in prompts.tokens]
            check_lengths(self.folder, tokens, skeleton.max_positions)
        self.modules = frozenset(name for names in self._layers.values() for name in names)
        longest = max(map(len, tokens))
        positions = dtype.itemsize * sum(map(_positions, self.prompts.values()))
        self.hidden_bytes = positions * skeleton.width
        batch = max(BATCH_TOKENS, longest)
        self.forward_bytes = self._forward_bytes(skeleton.shapes(), batch) + positions * skeleton.kept_width
        features = max(sum(sum(self._shape(name)) for name in names) for names in self._layers.values())
        self.batch_bytes = batch * features * dtype.itemsize
        self._layer_bytes = self._largest_layer(skeleton)
        self.ahead_bytes = len(self.prompts) * self._layer_bytes  # each data set runs a model of its own

    def inputs(self) -> dict[str, Input]:
        return {DATA[role]: _input(prompts) for role, prompts in self.prompts.items()}

    def notes(self) -> dict[str, tuple[str, ...]]:
        """By source of data: what was done otherwise than it or the options say."""
        return {prompts.source: prompts.notes for prompts in self.prompts.values()}

    def planned(self) -> list[list[Group]]:
        keeps = len(self.prompts.keys() - {"safe"})
        return [
            [Group((name,), self._shape(name)[1], keeps=keeps) for name in names] for names in self._layers.values()
        ]

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        total = sum(map(_positions, self.prompts.values()))
        with _named(self.folder, self.aligned.source):
            runs = {
                role: calibrate(
                    self.folder, self._load, self.aligned.tensors.keys(), prompts.tokens, device=device,
                    dtype=self.dtype, batch_tokens=BATCH_TOKENS, budget_bytes=budget * _positions(prompts) // total,
                    key=self.states_key(device, prompts),
                    saved=saved if number == 0 else UnsavedStates(saved.folders, saved.first), workers=workers,
                    ahead_bytes=self._layer_bytes,
                )
                for number, (role, prompts) in enumerate(self.prompts.items())
            }  # fmt: skip
            for layers in zip(*runs.values(), strict=True):
                yield _groups(dict(zip(runs, layers, strict=True)))

    def states_key(self, device: torch.device, prompts: Prompts) -> str:
        """Hash of all that the hidden states depend on, as far as headers tell."""
        decisive = (
            {package: version(package) for package in ("safeshard", "torch", "transformers")},
            self.aligned.source.identity, [(file.name, file.size, file.sha256) for file in self.aligned.files],
            hash_bytes((self.folder / "config.json").read_bytes()), prompts.tokens,
            str(self.dtype), device.type, BATCH_TOKENS,
        )  # fmt: skip
        return hash_bytes(json.dumps(decisive).encode())

    def _load(self, name: str, room: Room = fresh) -> Tensor:
        ref = self.aligned.tensors[name]
        tensor = room(ref.nbytes)
        self.aligned.source.readinto(ref.file, ref.offset, tensor.numpy().data)
        self.bytes_read += ref.nbytes
        return tensor.view(TORCH_DTYPES[ref.dtype]).view(ref.shape)

    def _shape(self, module: str) -> tuple[int, int]:
        """(O, I) of a linear."""
        return self.aligned.linears[module].shape

    def _largest_layer(self, skeleton: Skeleton) -> int:
        """The weights of a layer as they are stored."""
        stored = [[self.aligned.tensors[name].nbytes for name in skeleton.stored(path)] for path in self._layers]
        return max((sum(map(aligned_size, sizes)) for sizes in stored), default=0)

    def _forward_bytes(self, shapes: Mapping[str, Sequence[int]], tokens: int) -> int:
        """The weights of a layer, or of the embeddings, and the inputs and outputs of a layer's linears for a batch."""
        layer_of = {name: path for path in self._layers for name in shapes if name.startswith(path + ".")}
        held = dict.fromkeys(["", *self._layers], 0)
        for name, shape in shapes.items():
            held[layer_of.get(name, "")] += math.prod(shape)
        for path, names in self._layers.items():
            held[path] += tokens * sum(sum(self._shape(name)) for name in names)
        return max(held.values()) * self.dtype.itemsize


def _positions(prompts: Prompts) -> int:
    """Positions of all samples, each as long as the longest: at least those of the padded batches."""
    return len(prompts.tokens) * max(map(len, prompts.tokens))


def _input(prompts: Prompts) -> Input:
    data = prompts.file
    file = InputFile(name=data.name, size=len(data.data), blake3=prompts.blake3)
    return Input(source=data.source, revision=data.revision, files=(file,))


def _groups(layers: dict[str, LayerGrams]) -> list[Group]:
    """The groups of one decoder layer, of its Grams by role; what the layers held goes over to them."""
    shared: dict[tuple[int, ...], list[str]] = {}
    for name in next(iter(layers.values())).grams:
        shared.setdefault(tuple(id(layer.grams[name]) for layer in layers.values()), []).append(name)
    groups = []
    for names in shared.values():
        grams = {role: layer.grams[names[0]] for role, layer in layers.items()}
        kept = {role: gram for role, gram in grams.items() if role != "safe"}
        width = len(next(iter(grams.values())))
        groups.append(Group(tuple(names), width, grams.get("safe"), kept, keeps=len(kept)))
    for layer in layers.values():
        layer.grams.clear()
    return groups


def _check_shapes(aligned: Checkpoint, skeleton: Skeleton) -> None:
    remedy = "config.json and the weights do not belong together"
    offences = [
        aligned.offence(name, f"{list(shape)} by config.json", str(list(aligned.tensors[name].shape)), remedy)
        for name, shape in skeleton.shapes().items()
        if aligned.tensors[name].shape != tuple(shape)
    ]
    if offences:
        raise RequestError(offences)


@contextlib.contextmanager
def _named(folder: Path, source: Source) -> Iterator[None]:
    """Let offences name the model's source, not the local folder that stands for it."""

    def renamed(offence: Offence) -> Offence:
        where, got = (text.replace(str(folder), source.spec) for text in (offence.where, offence.got))
        return replace(offence, where=where, got=got)

    try:
        yield
    except RequestError as error:
        raise RequestError([renamed(offence) for offence in error.offences]) from error


def _model_folder(source: Source, folder: Path) -> Path:
    """The small files of a model in a local folder, wherever it lies: transformers then sees no weights and no code."""
    sizes = source.sizes()
    for name in MODEL_FILES:
        if name in sizes:
            (folder / name).write_bytes(source.read(name, 0, sizes[name]))
    return folder


def forward_dtype(aligned: Checkpoint, dtype: str | None) -> torch.dtype:
    """The dtype of the calibration's forward pass: as asked, else that of the first decoder linear."""
    if dtype is not None:
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    return TORCH_DTYPES[next(iter(aligned.linears.values())).dtype] if aligned.linears else torch.float32
