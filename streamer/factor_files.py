"""Factors on disk: one safetensors file a decoder layer, and factors.json, which ties them to model and data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Input, InputFile
from safeshard.streamer.checkpoint import Checkpoint, read_file_header
from safeshard.streamer.factors import Calibration, FactorSource, Group, forward_dtype
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.options import Options
from safeshard.streamer.sources import open_source, read_json
from safeshard.streamer.stream import Read

INDEX = "factors.json"
SCHEMA: Literal["safeshard.factors/1"] = "safeshard.factors/1"


class SavedGroup(Options):
    """Linears that share a factor, the file and tensor it lies in, and the hash of its bytes."""

    modules: tuple[str, ...]
    file: str = Field(pattern=r"^factors-\d{5}\.safetensors$")
    tensor: str
    damping: float
    blake3: str


class FactorIndex(Options):
    """factors.json: whose factors these are, how they were made, and where they lie. Layers in order."""

    schema_: Literal["safeshard.factors/1"] = Field(alias="schema")
    safeshard: str
    torch: str
    aligned: Input
    calibration: Input
    options: dict[str, int | float | str | None]
    layers: tuple[tuple[SavedGroup, ...], ...]
    reverted: dict[str, str] = Field(default_factory=dict)  # module -> why it has no factor


class SavedFactors:
    """Factors that `calibrate` wrote, of the aligned model given."""

    def __init__(self, place: str, aligned: Checkpoint) -> None:
        """Read the index and the headers.

        Raises:
            RequestError: it is no folder of factors, or they belong to another model.
        """
        self.source = open_source(place)
        self.index = _read_index(self)
        _check_model(self, aligned)
        self._places = _places(self)
        self.modules = frozenset(self._places) | self.index.reverted.keys()

    def inputs(self) -> dict[str, Input]:
        data = json.dumps(self.index.model_dump(mode="json", by_alias=True)).encode()
        file = InputFile(name=INDEX, size=self.source.sizes()[INDEX], blake3=hash_bytes(data))
        return {"factors": Input(source=self.source.spec, files=(file,)), "calibration": self.index.calibration}

    def layers(self, device: torch.device, memory: int, spill: Path) -> Iterator[Sequence[Group]]:
        for layer in self.index.layers:
            yield [
                Group(
                    g.modules, saved=Read(self.source, self._places[g.modules[0]]), damping=g.damping, blake3=g.blake3
                )
                for g in layer
            ]
        yield [Group((name,), reason=why) for name, why in self.index.reverted.items()]


def _read_index(saved: SavedFactors) -> FactorIndex:
    where = f"{saved.source.spec}/{INDEX}"
    if INDEX not in saved.source.sizes():
        raise RequestError(Offence(saved.source.spec, "", INDEX, "no such file", "name a folder that calibrate wrote"))
    try:
        return FactorIndex.model_validate(read_json(saved.source, INDEX))
    except ValidationError as error:
        raise RequestError(
            [
                Offence(where, ".".join(map(str, d["loc"])), d["msg"], repr(d["input"])[:80], "calibrate again")
                for d in error.errors()
            ]
        ) from None


def _check_model(saved: SavedFactors, aligned: Checkpoint) -> None:
    theirs = {f.name: f.header_sha256 for f in saved.index.aligned.files if f.header_sha256}
    ours = {f.name: f.sha256 for f in aligned.files}
    if theirs != ours:
        got = f"factors of {saved.index.aligned.source}, whose headers differ"
        raise RequestError(
            Offence(saved.source.spec, "", f"factors of {aligned.source.spec}", got, "calibrate this model")
        )


def _places(saved: SavedFactors) -> Mapping[str, TensorRef]:
    sizes = saved.source.sizes()
    files = {group.file for layer in saved.index.layers for group in layer}
    missing = sorted(files - sizes.keys())
    if missing:
        raise RequestError(
            [
                Offence(f"{saved.source.spec}/{f}", "", "a file of the index", "missing", "calibrate again")
                for f in missing
            ]
        )
    headers = {file: read_file_header(saved.source, file) for file in sorted(files)}
    places: dict[str, TensorRef] = {}
    for group in (group for layer in saved.index.layers for group in layer):
        ref = headers[group.file].tensors.get(group.tensor)
        if ref is None or ref.dtype != "F32" or len(ref.shape) != 2 or ref.shape[0] != ref.shape[1]:
            raise RequestError(
                Offence(
                    f"{saved.source.spec}/{group.file}", group.tensor, "a square F32 tensor", "none", "calibrate again"
                )
            )
        places.update(dict.fromkeys(group.modules, ref))
    return places


def open_factors(aligned: Checkpoint, job: SafeDelta) -> FactorSource:
    """The factors that a job asks for: saved ones, or those of a calibration run.

    Raises:
        RequestError: the model or the data is refused, or the saved factors belong to another model.
    """
    if job.factors is not None:
        return SavedFactors(job.factors, aligned)
    return Calibration(aligned, job, forward_dtype(aligned, job.dtype))
