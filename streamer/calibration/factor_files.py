"""Factors and Grams on disk: one safetensors file a decoder layer, and factors.json, which ties them to model and data.

A factor is an I x I tensor under the name of its first module; a Gram lies packed (`kernels/calibrated/half.py`) under
that name and its role: `model.layers.0.mlp.up_proj:safe`. Experts have files of their own, several in one, and
schema 3, which says how many tokens came to each. Folders of schema 1, which hold factors alone, are read as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from safeshard.kernels.calibrated.half import packed_size
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Hash, Input, InputFile
from safeshard.streamer.calibration.factors import Calibration, forward_dtype
from safeshard.streamer.calibration.groups import FactorSource, Group, Saved, SavedFactor
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.calibration.joined import Joined
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.expert_lora import is_expert
from safeshard.streamer.inputs.headers import read_file_header
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.inputs.samples import hash_samples
from safeshard.streamer.methods.shared.calibrated import CalibratedJob
from safeshard.streamer.options import Finite, Options
from safeshard.streamer.sources import MAX_JSON_BYTES, open_source
from safeshard.streamer.tensor_names import layer_of

INDEX = "factors.json"
Schema = Literal["safeshard.factors/1", "safeshard.factors/2", "safeshard.factors/3"]
SCHEMA: Schema = "safeshard.factors/2"
WITH_EXPERTS: Schema = "safeshard.factors/3"
FILE = r"factors-\d{5}\.safetensors"
Names = Annotated[tuple[str, ...], Field(min_length=1)]


Role = Literal["safe", "task", "keep"]


class SavedGram(Options):
    """A packed Gram: its tensor in the group's file, and the BLAKE3 of its bytes."""

    tensor: str
    blake3: Hash


class SavedGroup(Options):
    """Linears that share an input, the file that holds their factor and Grams, and the BLAKE3 of the factor's bytes.

    `added` is what was added to the Gram's diagonal, and 1 more at each of `dead`, before the factor was made. Of an
    expert `tokens` is how many came to it, and `shared` the share of the Gram of all tokens in its own.
    """

    modules: Names
    file: str = Field(pattern=f"^{FILE}$")
    tensor: str | None = None
    damping: Finite | None = Field(None, gt=0)
    added: Finite | None = None
    dead: tuple[int, ...] = ()
    blake3: Hash | None = None
    grams: dict[Role, SavedGram] = Field(default_factory=dict)
    reason: str = ""  # why there is no factor, where one was to be saved
    tokens: int | None = Field(None, ge=0)
    shared: Finite | None = Field(None, ge=0, le=1)

    @model_serializer(mode="wrap")
    def _of_experts_alone(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = handler(self)
        return {key: value for key, value in said.items() if key not in ("tokens", "shared") or value is not None}

    def tensors(self) -> dict[str, str]:
        """The BLAKE3 of each tensor of the file that belongs to this group."""
        found = {gram.tensor: gram.blake3 for gram in self.grams.values()}
        return found if self.tensor is None or self.blake3 is None else {self.tensor: self.blake3, **found}


class FactorIndex(Options):
    """factors.json: whose factors these are, how they were made, and where they lie, file by file in order.

    Headers alone do not tell a base model from its chat version, hence `sample`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Schema = Field(default=SCHEMA, alias="schema")
    safeshard: str
    torch: str
    aligned: Input
    sample: Hash  # of some of the aligned model's weights
    calibration: Input
    task_data: Input | None = None
    keep_data: Input | None = None
    options: dict[str, int | float | str | None]
    layers: tuple[tuple[SavedGroup, ...], ...]
    reverted: dict[str, str] = Field(default_factory=dict)  # module -> why it has no factor


class SavedFactors:
    """Factors that `calibrate` wrote, of the aligned model given."""

    forward_bytes = batch_bytes = kept_bytes = hidden_bytes = ahead_bytes = bytes_read = 0

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

    def notes(self) -> dict[str, tuple[str, ...]]:
        return {}

    def planned(self) -> list[list[Group]]:
        return self._layers

    @property
    def layer_numbers(self) -> range:
        return range(len(self._layers))

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
                width = _width(group, aligned)
                expected: dict[str, tuple[int, ...]] = {
                    gram.tensor: (packed_size(width),) for gram in group.grams.values()
                }
                if group.tensor is not None:
                    expected[group.tensor] = (width, width)
                for name, shape in expected.items():
                    ref = headers[group.file].get(name)
                    if ref is None or ref.dtype != "F32" or ref.shape != shape:
                        offences.append(self._offence(group.file, name, f"F32 {list(shape)}", _shown(ref)))
                if not offences:
                    groups.append(self._group(group, width, headers[group.file]))
            layers.append(groups)
        if offences:
            raise RequestError(offences)
        return [*layers, [Group((name,), 0, reason=why) for name, why in index.reverted.items()]]

    def _group(self, group: SavedGroup, width: int, tensors: Mapping[str, TensorRef]) -> Group:
        saved = {name: Saved(Read(self.source, tensors[name]), blake3) for name, blake3 in group.tensors().items()}
        factor = None
        if group.tensor is not None and group.damping is not None:
            factor = SavedFactor(saved[group.tensor], group.damping, group.added, group.dead)
        grams: dict[str, Saved] = {role: saved[gram.tensor] for role, gram in group.grams.items()}
        percdamp = float(self.index.options.get("percdamp") or 0.01)
        keeps = len({"task", "keep"} & grams.keys())
        return Group(
            group.modules, width, saved=factor, saved_grams=grams, keeps=keeps, percdamp=percdamp, reason=group.reason,
            tokens=group.tokens, shared=group.shared or 0.0,
        )  # fmt: skip

    def _offence(self, file: str, what: str, expected: str, got: str) -> Offence:
        return Offence(f"{self.source.spec}/{file}", what, expected, got, "calibrate again")


def sample_weights(aligned: Checkpoint) -> str:
    """BLAKE3 of samples of every linear of the first layer, and of one linear of each further layer, in turn.

    One expert stands for those of the first layer, which may be hundreds.
    """
    layers: dict[int | None, list[TensorRef]] = {}
    for name, stored in aligned.linears.items():
        refs = layers.setdefault(layer_of(name), [])
        if len(layers) > 1 or not is_expert(name) or ".experts.0." in name:
            refs.append(stored.ref)
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


def open_factors(aligned: Checkpoint, job: CalibratedJob) -> FactorSource:
    """The factors or Grams that a job asks for: saved ones, or those of a calibration run, or of both.

    Raises:
        RequestError: the model or the data is refused, or what was saved belongs to another model.
    """
    if job.factors is None:
        return Calibration(aligned, job, forward_dtype(aligned, None if job.recipe else job.dtype))
    saved = SavedFactors(job.factors, aligned)
    if not job.runs_more:
        return saved
    if any(group.keeps for layer in saved.planned() for group in layer):
        expected, got = "factors without task data, to add --task-data", "they have their own"
        raise RequestError(Offence(saved.source.spec, "", expected, got, "leave out --task-data"))
    return Joined(saved, Calibration(aligned, job, forward_dtype(aligned, job.dtype), ("task", "keep")))


def factor_offences(source: FactorSource, job: CalibratedJob) -> Iterator[Offence]:
    """What a job needs of saved factors, and what they lack."""
    if job.factors is None:
        return
    what = ""
    for group in (group for layer in source.planned() for group in layer):
        old = group.saved is not None and group.saved.added is None
        if (job.takes_grams or job.damping is not None) and "safe" not in group.saved_grams:
            what = "Gram matrices"
        elif job.target_leak is not None and not job.takes_grams and old:
            what = "factors that say what was added to the diagonal"
        elif not job.takes_grams and not group.is_saved and not group.reason:
            what = "factors, or Gram matrices"
    if what:
        yield Offence(job.factors, "", what, "none", "calibrate again with this version")
