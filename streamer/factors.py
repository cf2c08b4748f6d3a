"""Where Safe Delta's factors come from: a calibration run, layer by layer, or a folder that `calibrate` wrote."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from safeshard.kernels.factor import Factor, NonFiniteGramError, NotPositiveDefiniteError, safety_factor
from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input, InputFile
from safeshard.streamer.calibration import calibrate, check_lengths
from safeshard.streamer.checkpoint import Checkpoint
from safeshard.streamer.hidden_states import HiddenStates
from safeshard.streamer.methods.safedelta import Calibrated
from safeshard.streamer.prompts import BUILT_IN, Prompts, load_prompts
from safeshard.streamer.skeleton import Skeleton, read_config
from safeshard.streamer.sources import Source
from safeshard.streamer.stream import TORCH_DTYPES, Read, Step

BATCH_TOKENS = 4096  # part of what decides the last bits of a Gram
# What transformers reads to build a model and its tokenizer.
MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A factor in a file: its place, the damping it took, and the BLAKE3 of its bytes."""

    read: Read
    damping: float
    blake3: str


@dataclass
class Group:
    """Linears with one input of `width` features, hence one factor: made of the Gram, or saved, or missing."""

    modules: tuple[str, ...]
    width: int
    gram: Tensor | None = None  # I x I fp32, until the factor takes its place
    saved: Saved | None = None
    reason: str = ""  # why there is no factor
    _made: Factor | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def resident(self) -> int:
        """Bytes held while the layer is served: the Gram, then the factor."""
        return 4 * self.width**2 if self.saved is None else 0

    @property
    def scratch(self) -> int:
        """Bytes that making or reading the factor takes besides."""
        return 4 * self.width**2 * (2 if self.saved is None else 0)

    def factor(self, percdamp: float, loaded: Mapping[Hashable, Tensor], device: torch.device) -> Factor | str:
        """The factor, or why there is none. Whoever asks first makes it; others wait.

        Raises:
            RunError: the Gram is not finite, or the saved factor is not what was saved.
        """
        if self.saved is not None:
            return _read_factor(self.saved, loaded[self.saved.read.key], device)
        with self._lock:
            if self.gram is not None:
                self._make(self.gram, percdamp)
                self.gram = None
        return self._made or self.reason

    def _make(self, gram: Tensor, percdamp: float) -> None:
        try:
            self._made = safety_factor(gram, percdamp)
            if gram.is_cuda:
                torch.cuda.current_stream(gram.device).synchronize()  # other workers have streams of their own
        except NotPositiveDefiniteError as error:
            self.reason = f"its Gram matrix has no factor: {error}"
        except NonFiniteGramError as error:
            remedy = "look at the calibration data and the aligned checkpoint"
            raise RunError(f"{self.modules[0]}: {error}", remedy) from error


def _read_factor(saved: Saved, host: Tensor, device: torch.device) -> Factor:
    if hash_factor(host) != saved.blake3:
        place = f"{saved.read.source.spec}/{saved.read.ref.file}: {saved.read.ref.name}"
        raise RunError(f"{place} is not what calibrate wrote", "calibrate again")
    return Factor(host.to(device), saved.damping, (saved.damping,))


def hash_factor(u: Tensor) -> str:
    """BLAKE3 of a factor's bytes; it lies on the host, contiguous."""
    return hash_bytes(u.view(-1).view(torch.uint8).numpy().data)


class FactorSource(Protocol):
    """Factors of an aligned model's linears.

    Attributes:
        modules: the linears it answers for.
        forward_bytes: what running a layer of the aligned model on one batch holds, besides its Grams; 0 if none runs.
        batch_bytes: what each further batch adds that runs at the same time; 0 if nothing runs.
        hidden_bytes: host bytes of the hidden states at most; 0 if nothing runs.
        bytes_read: of the aligned model so far, to run it.
    """

    bytes_read: int
    modules: frozenset[str]
    forward_bytes: int
    batch_bytes: int
    hidden_bytes: int

    def inputs(self) -> dict[str, Input]:
        """What the manifest says of it, by role."""

    def planned(self) -> Sequence[Sequence[Group]]:
        """The groups of each decoder layer as far as headers tell, without Grams: none of them shared, if one runs."""

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        """The groups of each decoder layer, in order, at least from `saved.first` on.

        Clear one, and be through with its modules, before asking for the next.

        Args:
            budget: host bytes for hidden states; beyond them they lie in a file in the first of `saved.folders`.
            saved: where hidden states are saved, and found.
            workers: batches that run at once.
        """


def resident_bytes(source: FactorSource) -> int:
    """What a layer's Grams, and the factors that take their place, hold at most where the arithmetic is done."""
    return max((sum(group.resident for group in layer) for layer in source.planned()), default=0)


def device_bytes(source: FactorSource, steps: Iterable[Step]) -> int:
    """What calibrating and serving layer by layer holds at most where the arithmetic is done, one step at a time."""
    return resident_bytes(source) + max([source.forward_bytes, *(step.cost for step in steps)])


class Calibration:
    """Factors from a calibration run of the aligned model."""

    def __init__(self, aligned: Checkpoint, options: Calibrated, dtype: torch.dtype) -> None:
        """Check model and data.

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
            data, samples, longest = options.calibration, options.samples, options.max_tokens
            self.prompts: Prompts = load_prompts(
                data, self.folder, samples=samples, max_tokens=longest, seed=options.seed
            )
            check_lengths(self.folder, self.prompts.tokens, skeleton.max_positions)
        self.modules = frozenset(name for names in self._layers.values() for name in names)
        longest = max(map(len, self.prompts.tokens))
        width = int(read_config(self.folder).get_text_config().hidden_size)
        self.hidden_bytes = len(self.prompts.tokens) * longest * width * dtype.itemsize
        tokens = max(BATCH_TOKENS, longest)
        self.forward_bytes = self._forward_bytes(skeleton.shapes(), tokens)
        features = max(sum(sum(self._shape(name)) for name in names) for names in self._layers.values())
        self.batch_bytes = tokens * features * dtype.itemsize

    def inputs(self) -> dict[str, Input]:
        path = Path(self.options.calibration) if self.options.calibration else BUILT_IN
        file = InputFile(name=path.name, size=path.stat().st_size, blake3=self.prompts.blake3)
        return {"calibration": Input(source=self.prompts.source, files=(file,))}

    def planned(self) -> list[list[Group]]:
        return [[Group((name,), self._shape(name)[1]) for name in names] for names in self._layers.values()]

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        with _named(self.folder, self.aligned.source):
            for layer in calibrate(
                self.folder, self._load, self.aligned.tensors.keys(), self.prompts.tokens, device=device,
                dtype=self.dtype, batch_tokens=BATCH_TOKENS, budget_bytes=budget, key=self.states_key(device),
                saved=saved, workers=workers,
            ):  # fmt: skip
                shared: dict[int, list[str]] = {}
                for name, gram in layer.grams.items():
                    shared.setdefault(id(gram), []).append(name)
                groups = [
                    Group(tuple(names), len(layer.grams[names[0]]), layer.grams[names[0]]) for names in shared.values()
                ]
                layer.grams.clear()
                yield groups

    def states_key(self, device: torch.device) -> str:
        """Hash of all that the hidden states depend on, as far as headers tell."""
        decisive = (
            {package: version(package) for package in ("safeshard", "torch", "transformers")},
            self.aligned.source.identity, [(file.name, file.size, file.sha256) for file in self.aligned.files],
            hash_bytes((self.folder / "config.json").read_bytes()), self.prompts.tokens,
            str(self.dtype), device.type, BATCH_TOKENS,
        )  # fmt: skip
        return hash_bytes(json.dumps(decisive).encode())

    def _load(self, name: str) -> Tensor:
        ref = self.aligned.tensors[name]
        tensor = torch.empty(ref.nbytes, dtype=torch.uint8)
        self.aligned.source.readinto(ref.file, ref.offset, tensor.numpy().data)
        self.bytes_read += ref.nbytes
        return tensor.view(TORCH_DTYPES[ref.dtype]).view(ref.shape)

    def _shape(self, module: str) -> tuple[int, int]:
        """(O, I) of a linear."""
        shape = self.aligned.linears[module].shape
        return (shape[1], shape[0]) if self.aligned.is_transposed(module) else (shape[0], shape[1])

    def _forward_bytes(self, shapes: Mapping[str, Sequence[int]], tokens: int) -> int:
        """The weights of a layer, or of the embeddings, and the inputs and outputs of a layer's linears for a batch."""
        layer_of = {name: path for path in self._layers for name in shapes if name.startswith(path + ".")}
        held = dict.fromkeys(["", *self._layers], 0)
        for name, shape in shapes.items():
            held[layer_of.get(name, "")] += math.prod(shape)
        for path, names in self._layers.items():
            held[path] += tokens * sum(sum(self._shape(name)) for name in names)
        return max(held.values()) * self.dtype.itemsize


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
