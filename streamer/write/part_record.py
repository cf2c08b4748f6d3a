"""What a part of a batch leaves beside its tensors: what it did of an output, and numbers that all parts need."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safeshard.manifests.bounded import TooLargeError, read_regular, refuse_many
from safeshard.manifests.manifest_text import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES
from safeshard.manifests.schema import Fallback, Hash, ModuleEntry, Run, Tool
from safeshard.streamer.plan.ours import NUMBERS, PART_RECORD

T = TypeVar("T", bound=BaseModel)


class _Kept(BaseModel):
    """Frozen; `fingerprint` is that of the part's journal."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["safeshard.part/1"] = Field(default="safeshard.part/1", alias="schema")
    fingerprint: dict[str, Any]

    def to_bytes(self) -> bytes:
        """As it lies in the file."""
        return (self.model_dump_json(by_alias=True, exclude_none=False, indent=1) + "\n").encode()


class Numbers(_Kept):
    """What a part measured of its modules, where the whole output must be known before one is decided.

    Cosines (None: undefined), and what each strength lets through.
    """

    cosines: dict[str, float | None] = {}
    curves: dict[str, tuple[float, ...]] = {}


class PartRecord(_Kept):
    """What a part did: its modules' entries, its tensors' hashes, what it fell back to, and its figures.

    `checked` says, by role and file, how what it read of an input was held against what that's place states.
    """

    tool: Tool
    modules: tuple[ModuleEntry, ...]
    hashes: dict[str, Hash]
    fallbacks: tuple[Fallback, ...] = ()
    checked: dict[str, dict[str, Literal["hash", "ranges"]]] = {}
    run: Run


def read_record(folder: Path) -> PartRecord | None:
    """The record in a part's folder; None where it is not finished."""
    return _read(folder / PART_RECORD, PartRecord)


def read_numbers(folder: Path) -> Numbers | None:
    """The numbers in a part's folder; None where they are not all there yet."""
    return _read(folder / NUMBERS, Numbers)


def _read(path: Path, model: type[T]) -> T | None:
    try:
        return parse(read_regular(path, MAX_MANIFEST_BYTES), model)
    except (OSError, TooLargeError):
        return None


def parse(text: bytes, model: type[T]) -> T | None:
    """A record or numbers; None where they are torn, or not ours."""
    try:
        refuse_many(text, MAX_MANIFEST_VALUES)
        return model.model_validate_json(text)
    except (TooLargeError, ValidationError, ValueError):
        return None
