"""Where Safe Delta's factors come from: a calibration run, layer by layer, or a folder that `calibrate` wrote."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from safeshard.kernels.factor import Factor, NonFiniteGramError, NotPositiveDefiniteError, safety_factor
from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input, InputFile
from safeshard.streamer.calibration import calibrate
from safeshard.streamer.checkpoint import Checkpoint
from safeshard.streamer.methods.safedelta import Calibrated
from safeshard.streamer.prompts import BUILT_IN, Prompts, load_prompts
from safeshard.streamer.skeleton import Skeleton
from safeshard.streamer.sources import Source
from safeshard.streamer.stream import TORCH_DTYPES, Read

BATCH_TOKENS = 4096  # part of what decides the last bits of a Gram
# What transformers reads to build a model and its tokenizer.
MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Linears that share an input, hence a factor: made of its Gram (I x I fp32), or saved, or missing for a reason."""

    modules: tuple[str, ...]
    gram: Tensor | None = None
    saved: Read | None = None
    damping: float = 0.0
    blake3: str = ""  # of the saved factor's bytes
    reason: str = ""

    @property
    def scratch(self) -> int:
        """Host bytes of the Gram, and of the two more matrices that factoring it takes."""
        return 3 * self.gram.numel() * 4 if self.gram is not None else 0

    def factor(self, percdamp: float, loaded: Mapping[Any, Tensor], device: torch.device) -> Factor | str:
        """The factor, or why there is none.

        Raises:
            RunError: the Gram is not finite.
        """
        if self.saved is not None:
            host = loaded[self.saved.key]
            if hash_bytes(host.view(-1).view(torch.uint8).numpy().data) != self.blake3:
                place = f"{self.saved.source.spec}/{self.saved.ref.file}: {self.saved.ref.name}"
                raise RunError(f"{place} is not what calibrate wrote", "calibrate again")
            return Factor(host.to(device), self.damping, (self.damping,))
        if self.gram is None:
            return self.reason
        try:
            return safety_factor(self.gram, percdamp)
        except NotPositiveDefiniteError as error:
            return f"its Gram matrix has no factor: {error}"
        except NonFiniteGramError as error:
            remedy = "look at the calibration data and the aligned checkpoint"
            raise RunError(f"{self.modules[0]}: {error}", remedy) from error


class FactorSource(Protocol):
    """Factors of an aligned model's linears."""

    modules: frozenset[str]

    def inputs(self) -> dict[str, Input]:
        """What the manifest says of it, by role."""

    def layers(self, device: torch.device, memory: int, spill: Path) -> Iterator[Sequence[Group]]:
        """The groups of each decoder layer, in order. Drop one before asking for the next."""


class Calibration:
    """Factors from a calibration run of the aligned model."""

    def __init__(self, aligned: Checkpoint, options: Calibrated, dtype: torch.dtype) -> None:
        """Check model and data.

        Raises:
            RequestError: the model is none that can be calibrated, or the data is refused.
        """
        self.aligned, self.options, self.dtype = aligned, options, dtype
        self._local = tempfile.TemporaryDirectory(prefix="safeshard-")
        self.folder = _model_folder(aligned.source, Path(self._local.name))
        with _named(self.folder, aligned.source):
            skeleton = Skeleton(self.folder, aligned.tensors.keys(), dtype)
            self.modules = frozenset(name for path in skeleton.layers for name in skeleton.linears(path))
            data, samples, longest = options.calibration, options.samples, options.max_tokens
            self.prompts: Prompts = load_prompts(
                data, self.folder, samples=samples, max_tokens=longest, seed=options.seed
            )

    def inputs(self) -> dict[str, Input]:
        path = Path(self.options.calibration) if self.options.calibration else BUILT_IN
        file = InputFile(name=path.name, size=path.stat().st_size, blake3=self.prompts.blake3)
        return {"calibration": Input(source=self.prompts.source, files=(file,))}

    def layers(self, device: torch.device, memory: int, spill: Path) -> Iterator[Sequence[Group]]:
        for layer in calibrate(
            self.folder, self._load, self.aligned.tensors.keys(), self.prompts.tokens, device=device, dtype=self.dtype,
            batch_tokens=BATCH_TOKENS, budget_bytes=memory // 2, spill_folder=spill,
        ):  # fmt: skip
            shared: dict[int, list[str]] = {}
            for name, gram in layer.grams.items():
                shared.setdefault(id(gram), []).append(name)
            groups = [Group(tuple(names), layer.grams[names[0]]) for names in shared.values()]
            layer.grams.clear()
            yield groups
            groups.clear()

    def _load(self, name: str) -> Tensor:
        ref = self.aligned.tensors[name]
        tensor = torch.empty(ref.nbytes, dtype=torch.uint8)
        self.aligned.source.readinto(ref.file, ref.offset, tensor.numpy().data)
        return tensor.view(TORCH_DTYPES[ref.dtype]).view(ref.shape)


@contextlib.contextmanager
def _named(folder: Path, source: Source) -> Iterator[None]:
    """Let offences name the model's source, not the local folder that stands for it."""
    try:
        yield
    except RequestError as error:
        where = [offence.where.replace(str(folder), source.spec) for offence in error.offences]
        raise RequestError([replace(o, where=w) for o, w in zip(error.offences, where, strict=True)]) from error


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
