"""The manifest: what a job read, decided and wrote (`safeshard.manifest/1`).

Immutable pydantic models that mirror manifest.json field by field. Optional fields that are None are left out of the
JSON; NaN and infinity never enter it (a cosine of a zero delta is None, with a `note`). Serialisation is a pure
function of the content: field order as declared, floats by `repr`, ASCII only, one list entry a line.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.manifest_text import MANIFEST_NAME as MANIFEST_NAME
from safeshard.manifests.manifest_text import layout, read_manifest, reject_ambiguous, repeated

SCHEMA = "safeshard.manifest/1"
JOURNAL_NAME = "journal.jsonl"

Decision = Literal["kept", "merged", "projected", "selected", "shrunk", "scaled", "reverted"]
Action = Literal["copied", "edited", "new"]
Name = Annotated[str, Field(min_length=1)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits, lower case")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
_First = Field(fail_fast=True)  # of a list's entries that are wrong the first is an error: there may be a million


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Tool(_Entry):
    """Versions of what ran, and the device it ran on."""

    safeshard: str
    torch: str | None = None
    triton: str | None = None
    device: str


class Method(_Entry):
    """The method, the link to its paper, and its options as resolved, defaults included."""

    name: Name
    paper: str
    options: dict[str, JsonValue]
    seed: int | None = None

    @field_validator("options")
    @classmethod
    def _can_be_written(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(options, allow_nan=False)  # JSON's 1e999 is read as infinity
        return options


class InputFile(_Entry):
    """A file that was read: a safetensors file by the hash of its header, any other by the hash of its content.

    `sample_blake3` is of a safetensors file's bytes up to 64 MiB; of a larger one, of 16 KiB from the middle of each
    tensor. It is left out where a commit pins the content. `checked` says how what was read was held against what the
    Hub states of the file: "hash" (the whole file was hashed) or "ranges" (ranges of it were read, each answer held
    against size, commit and ETag).
    """

    name: Name
    size: Count
    header_sha256: Hash | None = None
    sample_blake3: Hash | None = None
    blake3: Hash | None = None
    checked: Literal["hash", "ranges"] | None = None


class Input(_Entry):
    """One input of the job, under its role (aligned, unaligned, adapter, calibration, ...)."""

    source: str
    revision: str | None = None
    files: Annotated[tuple[InputFile, ...], _First]


class Effect(_Entry):
    """What is left of a fine-tuned delta: of one module's, or of all together.

    `kept_norm` is the Frobenius norm of the delta that was written, as a share of the norm of the one that came in,
    `delta_norm`; `cosine` is the cosine between the two. What is not defined (of a zero delta) is left out. What was
    written is measured, rounding included: exactly for adapters, and for a weight of more than 262144 entries by a
    part of them.
    """

    kept_norm: float | None = Field(default=None, ge=0)
    cosine: float | None = Field(default=None, ge=-1, le=1)
    delta_norm: float | None = Field(default=None, ge=0)


class Caution(_Entry):
    """What a reader should know before the output is used: its kind, a sentence, and what to do about it."""

    kind: Name
    text: str
    remedy: str | None = None


class ModuleEntry(_Entry):
    """What was decided about one module.

    `reverted` means that the aligned weights were kept. `cosine` is the gate's; `near_threshold` marks one within
    1e-5 of the threshold. `selected_fraction`, `budget`, `loss`, `damping` and `strength` (where a leak decided it) are
    Safe Delta's, `penalty` is ridge's, `directions` how many the entropy of LSSF asked for; `rank` is the written
    adapter's and `lost_fraction` what truncation to it lost, as a fraction of the Frobenius norm. `energy` is
    tr(D H D^T) of the fine-tuned delta D on safe inputs of Gram H, and `leak` the share of it that is left. Of an
    expert `tokens` is how many of the calibration came to it and, where they were too few, `shared_gram` the share of
    the Gram of all tokens in its own.
    Of a quantised weight `blocks` is how many blocks it has, `blocks_changed` how many of them were written anew, and
    `encoding_error` how far these are from what was to be written, as a fraction of its Frobenius norm; where an
    expert's gate and up lie in one region, the second one's entry speaks for both.
    """

    name: Name
    decision: Decision
    cosine: float | None = None
    threshold: float | None = None
    near_threshold: bool | None = None
    weights: Annotated[tuple[float, ...], _First] | None = None
    selected_fraction: float | None = None
    budget: float | None = None
    loss: float | None = None
    damping: float | None = None
    strength: float | None = None
    penalty: float | None = None
    energy: float | None = None
    leak: float | None = None
    tokens: Count | None = None
    shared_gram: float | None = None
    rank: Count | None = None
    lost_fraction: float | None = None
    directions: Count | None = None
    blocks: Count | None = None
    blocks_changed: Count | None = None
    encoding_error: float | None = None
    effect: Effect | None = None
    note: str | None = None


class TensorEntry(_Entry):
    """One tensor of the output: where it is, its safetensors dtype (`BF16`), its shape and the hash of its bytes.

    `source` is the role of the input that a tensor was taken over from which no method treats.
    """

    name: Name
    file: Name
    dtype: Name
    shape: Annotated[tuple[Count, ...], _First]
    action: Action
    blake3: Hash
    source: Name | None = None


class FileEntry(_Entry):
    """One file of the output, hashed by `blake3`; a safetensors file by `header_sha256`, for `tensors` has its data."""

    name: Name
    size: Count
    blake3: Hash | None = None
    header_sha256: Hash | None = None

    @model_validator(mode="after")
    def _one_hash(self) -> "FileEntry":
        if (self.blake3 is None) == (self.header_sha256 is None):
            raise ValueError(f"{self.name!r} needs either blake3 or header_sha256")
        return self


class Fallback(_Entry):
    """Where something else was done than was asked, and why; `subject` names the module or file concerned."""

    asked: str
    done: str
    why: str
    subject: str | None = None


class Run(_Entry):
    """The figures of the run: bytes, seconds (whole and by stage), peak memory in bytes."""

    start: AwareDatetime
    wall_s: float
    bytes_read: Count
    bytes_written: Count
    peak_host_bytes: Count
    peak_device_bytes: Count
    peak_buffer_bytes: Count | None = None
    seconds: dict[str, float] = {}


class Manifest(_Entry):
    """manifest.json. `files` names every file of the output but the manifest itself. `effect` is that of all modules.

    `blake3` is the hash of the content without that field. It reveals damage and careless edits; it is not a
    signature, since whoever forges the content can compute it anew.
    """

    schema_: Literal["safeshard.manifest/1"] = Field(default="safeshard.manifest/1", alias="schema")
    tool: Tool
    method: Method
    inputs: dict[str, Input]
    modules: Annotated[tuple[ModuleEntry, ...], _First]
    tensors: Annotated[tuple[TensorEntry, ...], _First]
    files: Annotated[tuple[FileEntry, ...], _First]
    fallbacks: Annotated[tuple[Fallback, ...], _First] = ()
    effect: Effect | None = None
    warnings: Annotated[tuple[Caution, ...], _First] | None = None
    run: Run
    blake3: Hash | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        for kind, names in (
            ("module", (m.name for m in self.modules)),
            ("tensor", (t.name for t in self.tensors)),
            ("file", (f.name for f in self.files)),
        ):
            if twice := repeated(names):
                raise ValueError(f"{kind} named twice: {', '.join(map(repr, twice))}")
        with_header = {f.name for f in self.files if f.header_sha256 is not None}
        if unlisted := sorted({t.file for t in self.tensors} - with_header):
            raise ValueError(f"files has no header_sha256 for {', '.join(map(repr, unlisted))}")
        return self

    @property
    def leak(self) -> float | None:
        """The share of the delta's energy on safe inputs that is left, over all modules; None where none is known."""
        known = [(m.energy, m.leak * m.energy) for m in self.modules if m.leak is not None and m.energy is not None]
        energy = math.fsum(whole for whole, _ in known)
        return math.fsum(left for _, left in known) / energy if energy else None

    def content_hash(self) -> str:
        """BLAKE3 of the content: canonical JSON (sorted keys, no spaces) without the `blake3` field."""
        content = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"blake3"})
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hash_bytes(canonical.encode("ascii"))

    def sealed(self) -> "Manifest":
        """This manifest with `blake3` set to its content's hash."""
        return self.model_copy(update={"blake3": self.content_hash()})

    def to_json(self) -> str:
        """The text of manifest.json, sealed, with a trailing newline."""
        return layout(self.sealed().model_dump(mode="json", by_alias=True, exclude_none=True)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> "Manifest":
        """Parse manifest.json; RequestError lists every field that is wrong. `blake3` is kept, not compared."""
        try:
            reject_ambiguous(text.encode() if isinstance(text, str) else text)
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False)
            raise RequestError([_offence(where, detail) for detail in details]) from error
        except (ValueError, RecursionError) as error:
            raise RequestError(Offence(where, expected="a manifest in JSON", got=str(error))) from error


def load(path: Path) -> Manifest:
    """The manifest at `path`: the file, or the output folder that holds it."""
    file = path / MANIFEST_NAME if path.is_dir() else path
    return Manifest.from_json(read_manifest(file), where=str(file))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of manifest.json, exported as `manifest.schema.json` beside this file."""
    schema = Manifest.model_json_schema(by_alias=True)
    schema["properties"]["schema"].pop("enum", None)  # older releases of pydantic repeat `const` there
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}


def _offence(where: str, detail: ErrorDetails) -> Offence:
    value = detail["input"]
    got = (
        type(value).__name__
        if isinstance(value, dict | list | Manifest | FileEntry)
        else repr(value[:200] if isinstance(value, str) else value)
    )
    return Offence(where, ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Input should be "), got)
