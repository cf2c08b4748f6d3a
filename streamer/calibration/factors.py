"""Where Safe Delta's factors come from: a calibration run, layer by layer, or a folder that `calibrate` wrote."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input, InputFile
from safeshard.streamer.calibration.data.data_files import DATA
from safeshard.streamer.calibration.data.prompts import Prompts, load_prompts
from safeshard.streamer.calibration.expert_grams import portions, scratch_bytes
from safeshard.streamer.calibration.expert_stage import BUFFERS
from safeshard.streamer.calibration.forward import LayerGrams, calibrate
from safeshard.streamer.calibration.groups import Group
from safeshard.streamer.calibration.hidden_states import HiddenStates, UnsavedStates
from safeshard.streamer.calibration.model.ahead import aligned_size
from safeshard.streamer.calibration.model.batches import check_lengths
from safeshard.streamer.calibration.model.skeleton import Skeleton
from safeshard.streamer.calibration.model.weights import Weights
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.names.unbuilt import text_config
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
        self._local = tempfile.TemporaryDirectory(prefix="safeshard-")
        self.folder = _model_folder(aligned.source, Path(self._local.name))
        self._weights = Weights(aligned)
        if offences := list(aligned.untreatable_tensors()):
            raise RequestError(offences)
        with _named(self.folder, aligned.source):
            skeleton = Skeleton(self.folder, self._weights.shapes.keys(), dtype)
            _check_shapes(aligned, self._weights, skeleton)
            self._layers = {path: list(skeleton.linears(path)) for path in skeleton.layers}
            self._experts = skeleton.experts
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
        self.modules = frozenset(name for groups in self.planned() for group in groups for name in group.modules)
        longest = max(map(len, tokens))
        positions = dtype.itemsize * sum(map(_positions, self.prompts.values()))
        self.hidden_bytes = positions * skeleton.width * (BUFFERS if self._experts else 1)
        batch = max(BATCH_TOKENS, longest)
        features = max(sum(sum(self._shape(name)) for name in names) for names in self._layers.values())
        alone = [self._weights.expert_bytes(e, dtype) + scratch_bytes(e, dtype) for e in self._experts.values()]
        self.batch_bytes = max([batch * features * dtype.itemsize, *alone])
        of_all = max([4 * (e.width**2 + e.inner**2) for e in self._experts.values()], default=0)
        self.forward_bytes = (
            self._forward_bytes(skeleton.shapes(), batch) + positions * skeleton.kept_width
            + max(alone, default=0) + of_all
        )  # fmt: skip
        self.kept_bytes = self._kept_bytes(skeleton) + of_all if self._experts else 0
        self._layer_bytes = self._largest_layer(skeleton)
        self.ahead_bytes = len(self.prompts) * self._layer_bytes  # each data set runs a model of its own

    def inputs(self) -> dict[str, Input]:
        return {DATA[role]: _input(prompts) for role, prompts in self.prompts.items()}

    def notes(self) -> dict[str, tuple[str, ...]]:
        """By source of data: what was done otherwise than it or the options say."""
        return {prompts.source: prompts.notes for prompts in self.prompts.values()}

    def planned(self) -> list[list[Group]]:
        return [groups for path in self._layers for groups in self._planned(path)]

    @cached_property
    def layer_numbers(self) -> list[int]:
        return [number for number, path in enumerate(self._layers) for _ in self._planned(path)]

    def _planned(self, path: str) -> Iterator[list[Group]]:
        """A layer's experts, some at a time; then its other linears."""
        keeps = len(self.prompts.keys() - {"safe"})
        if (experts := self._experts.get(path)) is not None:
            for chosen in portions(experts):
                named = [{role: self._weights.linear(experts, i, role) for role in experts.roles} for i in chosen]
                yield [
                    Group(names, experts.roles[role][1], keeps=keeps, tokens=0)
                    for each in named
                    for role, names in (
                        ("up_proj", tuple(name for role, name in each.items() if role != "down_proj")),
                        ("down_proj", (each["down_proj"],)),
                    )
                ]
        yield [Group((name,), self._shape(name)[1], keeps=keeps) for name in self._layers[path]]

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        total = sum(map(_positions, self.prompts.values()))
        with _named(self.folder, self.aligned.source):
            runs = {
                role: calibrate(
                    self.folder, self._weights.load, self._weights.shapes.keys(), prompts.tokens, device=device,
                    dtype=self.dtype, batch_tokens=BATCH_TOKENS, budget_bytes=budget * _positions(prompts) // total,
                    key=self.states_key(device, prompts),
                    saved=saved if number == 0 else UnsavedStates(saved.folders, saved.first), workers=workers,
                    ahead_bytes=self._layer_bytes, experts=self._weights,
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

    @property
    def bytes_read(self) -> int:
        return self._weights.bytes_read

    def _shape(self, module: str) -> tuple[int, int]:
        """(O, I) of a linear."""
        return self.aligned.linears[module].shape

    def _largest_layer(self, skeleton: Skeleton) -> int:
        """The weights of a layer as they are stored."""
        stored = [[self._weights.nbytes(name) for name in skeleton.stored(path)] for path in self._layers]
        return max((sum(map(aligned_size, sizes)) for sizes in stored), default=0)

    def _kept_bytes(self, skeleton: Skeleton) -> int:
        """The weights of a layer beside its experts: they stay while these are served."""
        shapes = skeleton.shapes()
        held = [sum(math.prod(shapes[name]) for name in skeleton.stored(path)) for path in self._experts]
        return max(held, default=0) * self.dtype.itemsize

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
    first = next(iter(layers.values()))
    for names in shared.values():
        grams = {role: layer.grams[names[0]] for role, layer in layers.items()}
        kept = {role: gram for role, gram in grams.items() if role != "safe"}
        width = len(next(iter(grams.values())))
        group = Group(tuple(names), width, grams.get("safe"), kept, keeps=len(kept))
        if (seen := first.seen.get(names[0])) is not None:
            group.tokens, group.shared = seen.tokens, seen.shared
        groups.append(group)
    for layer in layers.values():
        layer.grams.clear()
    return groups


def _check_shapes(aligned: Checkpoint, weights: Weights, skeleton: Skeleton) -> None:
    remedy = "config.json and the weights do not belong together"
    offences = [
        aligned.offence(name, f"{list(shape)} by config.json", str(list(weights.shapes[name])), remedy)
        for name, shape in skeleton.shapes().items()
        if weights.shapes[name] != tuple(shape)
    ]
    offences += [offence for experts in skeleton.experts.values() for offence in weights.offences(experts)]
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
    """The dtype of the calibration's forward pass: as asked, else that of the first decoder linear.

    Of a quantised model it is what config.json says, else bf16.
    """
    if dtype is not None:
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    first = next(iter(aligned.linears.values()), None)
    if first is None or not first.encoded:
        return TORCH_DTYPES[first.dtype] if first is not None else torch.float32
    text = text_config(aligned.config)
    said = text.get("dtype") or text.get("torch_dtype") or aligned.config.get("dtype")
    floats = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return floats.get(str(said or aligned.config.get("torch_dtype")), torch.bfloat16)
