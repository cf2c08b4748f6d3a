"""Factors on disk: one safetensors file a decoder layer, and factors.json, which ties them to model and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Hash, Input, InputFile
from safeshard.streamer.calibration.factors import Calibration, forward_dtype
from safeshard.streamer.calibration.groups import FactorSource, Group, Saved
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.headers import read_file_header
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.inputs.samples import hash_samples
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.options import Finite, Options
from safeshard.streamer.sources import MAX_JSON_BYTES, open_source
from safeshard.streamer.tensor_names import layer_of

INDEX = "factors.json"
SCHEMA: Literal["safeshard.factors/1"] = "safeshard.factors/1"
FILE = r"factors-\d{5}\.safetensors"
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class SavedGroup(Options):
    """Linears that share a factor, the file and tensor it lies in, and the BLAKE3 of its bytes."""

    modules: Names
    file: str = Field(pattern=f"^{FILE}$")
    tensor: str
    damping: Finite = Field(gt=0)
    blake3: Hash


class FactorIndex(Options):
    """factors.json: whose factors these are, how they were made, and where they lie. Layers in order.

    Headers alone do not tell a base model from its chat version, hence `sample`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["safeshard.factors/1"] = Field(default=SCHEMA, alias="schema")
    safeshard: str
    torch: str
    aligned: Input
    sample: Hash  # of some of the aligned model's weights
    calibration: Input
    options: dict[str, int | float | str | None]
    layers: tuple[tuple[SavedGroup, ...], ...]
    reverted: dict[str, str] = Field(default_factory=dict)  # module -> why it has no factor


class SavedFactors:
    """Factors that `calibrate` wrote, of the aligned model given."""

    forward_bytes = batch_bytes = hidden_bytes = bytes_read = 0

    def __init__(self, place: str, aligned: Checkpoint) -> None:
        """Read the index and the headers.

        Raises:
            RequestError: it is no folder of factors, or they belong to another model.
        """
        self.source = open_source(place)
        self.index, self._blake3 = self._read_index()
        self._refuse_other_model(aligned)
        self._layers = self._groups(aligned)
        self.modules = frozenset(name for layer in self._layers for group in layer for name in group.modules)

    def inputs(self) -> dict[str, Input]:
        file = InputFile(name=INDEX, size=self.source.sizes()[INDEX], blake3=self._blake3)
        return {"factors": Input(source=self.source.spec, files=(file,)), "calibration": self.index.calibration}

    def planned(self) -> list[list[Group]]:
        return self._layers

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        yield from map(list, self._layers)

    def _read_index(self) -> tuple[FactorIndex, str]:
        sizes = self.source.sizes()
        if INDEX not in sizes:
            raise RequestError(
                Offence(self.source.spec, "", INDEX, "no such file", "name a folder that calibrate wrote")
            )
        if sizes[INDEX] > MAX_JSON_BYTES:
            raise RequestError(self._offence(INDEX, "", f"at most {MAX_JSON_BYTES} bytes", f"{sizes[INDEX]} bytes"))
        data = self.source.read(INDEX, 0, sizes[INDEX])
        try:
            return FactorIndex.model_validate_json(data), hash_bytes(data)
        except ValidationError as error:
            raise RequestError(
                [
                    self._offence(INDEX, ".".join(map(str, d["loc"])), "the index of calibrate", d["msg"])
                    for d in error.errors()
                ]
            ) from None

    def _refuse_other_model(self, aligned: Checkpoint) -> None:
        theirs = {file.name: file.header_sha256 for file in self.index.aligned.files}
        same_headers = theirs == {file.name: file.sha256 for file in aligned.files}
        if not same_headers or sample_weights(aligned) != self.index.sample:
            got = f"factors of {self.index.aligned.source}, whose {'weights' if same_headers else 'headers'} differ"
            raise RequestError(
                Offence(self.source.spec, "", f"factors of {aligned.source.spec}", got, "calibrate this model")
            )

    def _groups(self, aligned: Checkpoint) -> list[list[Group]]:
        """The groups of each layer; last those without a factor."""
        index, sizes = self.index, self.source.sizes()
        files = sorted({group.file for layer in index.layers for group in layer})
        offences = [self._offence(file, "", "a file of the index", "missing") for file in files if file not in sizes]
        if offences:
            raise RequestError(offences)
        headers = {file: read_file_header(self.source, file).tensors for file in files}
        named = Counter(name for layer in index.layers for group in layer for name in group.modules)
        named.update(index.reverted.keys())
        for name, count in named.items():
            if count > 1 or name not in aligned.linears:
                offences.append(self._offence(INDEX, name, "a linear of the model, once", f"{count} entries"))
        layers = []
        for layer in index.layers:
            groups = []
            for group in layer:
                ref, width = headers[group.file].get(group.tensor), _width(group, aligned)
                if ref is None or ref.dtype != "F32" or ref.shape != (width, width):
                    expected, got = f"F32 {[width, width]}", _shown(ref)
                    offences.append(self._offence(group.file, group.tensor, expected, got))
                else:
                    saved = Saved(Read(self.source, ref), group.damping, group.blake3)
                    groups.append(Group(group.modules, width, saved=saved))
            layers.append(groups)
        if offences:
            raise RequestError(offences)
        return [*layers, [Group((name,), 0, reason=why) for name, why in index.reverted.items()]]

    def _offence(self, file: str, what: str, expected: str, got: str) -> Offence:
        return Offence(f"{self.source.spec}/{file}", what, expected, got, "calibrate again")


def sample_weights(aligned: Checkpoint) -> str:
    """BLAKE3 of samples of every linear of the first layer, and of one linear of each further layer, in turn."""
    layers: dict[int | None, list[TensorRef]] = {}
    for name, stored in aligned.linears.items():
        layers.setdefault(layer_of(name), []).append(stored.ref)
    chosen = [
        ref for number, refs in enumerate(layers.values()) for ref in ([refs[number % len(refs)]] if number else refs)
    ]
    return hash_samples(aligned.source, chosen)


def _width(group: SavedGroup, aligned: Checkpoint) -> int:
    """Input features of a group's linears; 0 where the model has no such linear, or they differ."""
    widths = {stored.shape[1] for name in group.modules if (stored := aligned.linears.get(name)) is not None}
    return widths.pop() if len(widths) == 1 else 0


def _shown(ref: TensorRef | None) -> str:
    return "no such tensor" if ref is None else f"{ref.dtype} {list(ref.shape)}"


def open_factors(aligned: Checkpoint, job: SafeDelta) -> FactorSource:
    """The factors that a job asks for: saved ones, or those of a calibration run.

    Raises:
        RequestError: the model or the data is refused, or the saved factors belong to another model.
    """
    if job.factors is not None:
        return SavedFactors(job.factors, aligned)
    return Calibration(aligned, job, forward_dtype(aligned, job.dtype))
