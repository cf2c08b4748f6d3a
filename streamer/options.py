"""Options: frozen pydantic models, the one source of the command line, the Python API and the manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from safeshard.manifests.errors import Offence, RequestError, without_secrets

T = TypeVar("T", bound=BaseModel)
F = TypeVar("F", bound=Callable[..., Any])
Finite = Annotated[float, Field(allow_inf_nan=False)]


def expanded(value: Any) -> Any:
    """A path whose `~` is the home folder, if there is one: shells expand it, but not in `--output=~/x`, nor YAML."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return os.path.expanduser(text) if isinstance(text, str) else text  # noqa: PTH111  # Path's raises without a home


def local(value: Any) -> Any:
    """A path to write to, expanded; one with a scheme is refused: nothing is written there, nor to a folder `s3:`."""
    text = expanded(value)
    if isinstance(text, str) and (match := _SCHEME.match(text)):
        if (match[1] or "").lower() != "file":
            raise PydanticCustomError("remote_place", REMOTE)
        return text[len("file://") :]
    return text


def output_place(value: Any) -> Any:
    """Where an output goes: a local path, expanded, or the URL of a place afar, as text."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):  # bytes of YAML would else become text, and as text a place afar
        raise PydanticCustomError("path_type", EXPECTED["path_type"])
    if not (match := _SCHEME.match(text)) or (match[1] or "").lower() == "file":
        return Path(local(text))
    url = _LOST_SLASH.sub(r"\1://", text, count=1).rstrip("/")
    scheme, _, rest = url.partition("://")
    wanted = _REPOSITORY if scheme == "hf" else _PREFIX if scheme in ("s3", "gs", "az") else None
    if wanted is None or not wanted.fullmatch(rest) or {"", ".", ".."} & set(rest.split("/")):
        raise PydanticCustomError("remote_place", WRITABLE)
    return url


def written_place(value: str | os.PathLike[str]) -> Path | str:
    """Where a finished output lies: a local path, or the URL of a place afar.

    Raises:
        RequestError: nothing is read from places of that kind.
    """
    text = os.fspath(value)
    if (match := _SCHEME.match(text)) is None or (match[1] or "").lower() == "file":
        return Path(local(text))
    url = _LOST_SLASH.sub(r"\1://", text, count=1)
    if url.partition("://")[0].lower() not in ("hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"):
        raise RequestError(Offence(_shown(url), "", "an output in a folder, a bucket or on the Hub", "another place"))
    return url


def repository(value: Any) -> Any:
    """A repository of the Hub to write to: org/name."""
    text = value.removeprefix("hf://") if isinstance(value, str) else value
    if not isinstance(text, str) or not _REPOSITORY.fullmatch(text):
        raise PydanticCustomError("repository", "org/name: a repository of the Hub, without revision and folder")
    return text


def local_path(option: str, value: str | os.PathLike[str]) -> Path:
    """A path to write to, that a function takes beside its options.

    Raises:
        RequestError: it has a scheme.
    """
    try:
        return Path(local(value))
    except PydanticCustomError:
        raise RequestError(Offence(option, "", REMOTE, _shown(os.fspath(value)))) from None


# Path("s3://b/x") has lost a slash. A single letter is no scheme.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z\d+.-]+)://|(?!file:)[A-Za-z][A-Za-z\d+.-]+:/", re.IGNORECASE)
_LOST_SLASH = re.compile(r"\b([A-Za-z][A-Za-z\d+.-]+):/(?=[^/\s])")
REMOTE = "a local folder: write it there, then copy it (hf upload, aws s3 sync, gsutil rsync)"

WRITABLE = (
    "a local folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or hf://org/name, without "
    "credentials, revision and query"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9][\w.-]*(/[^/?#@*\\]+)+")

Place = Annotated[str, Field(min_length=1), BeforeValidator(expanded)]
Folder = Annotated[Path, BeforeValidator(local)]
Output = Annotated[str | Path, BeforeValidator(output_place)]
Repository = Annotated[str, BeforeValidator(repository)]
Dtype = Literal["bfloat16", "float16", "float32"]

EXPECTED = {  # by pydantic's type of error, where its own message does not go on from "expected"
    "string_pattern_mismatch": "auto, cpu, cuda or cuda:N",  # --device alone has a pattern
    "byte_size": "a size such as 2GiB",
    "byte_size_unit": "a size such as 2GiB",
    "path_type": "a path",
    "string_too_short": "a place",  # no other text has a least length
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} of them",
}


class Options(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse YAML's yes and true, which would else count as the number 1."""
        values = value if isinstance(value, list | tuple) else [value]
        if cls.model_fields[info.field_name or ""].annotation is not bool and any(isinstance(v, bool) for v in values):
            raise PydanticCustomError("truth_value", "a value other than true and false")
        return value

    @field_validator("*")
    @classmethod
    def _path_text(cls, value: Any) -> Any:
        """Refuse NUL and lone surrogates, which no path can hold; YAML's escapes can write them."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path) and ("\0" in str(text) or not _encodable(str(text))):
                raise PydanticCustomError("path_text", "text without NUL and lone surrogates")
        return value


class RunOptions(Options):
    """How to run, whatever the jobs are. None of these changes a byte of the output."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    memory: ByteSize = Field(ByteSize(2 << 30), gt=0, description="host memory for tensors in flight, e.g. 2GiB")
    io: Literal["auto", "direct", "buffered"] = Field(
        "auto", description="read local files past the page cache (direct) or through it; auto measures where they are "
        "larger than memory",
    )  # fmt: skip
    dry_run: bool = Field(False, description="print the plan, its bytes and its memory; write nothing")
    cache: bool = Field(False, description="keep the shards read from the Hub, whole, in its cache")
    cache_budget: ByteSize | None = Field(
        None, gt=0, description="keep at most this much of them there at a time, e.g. 50GB (implies --cache)"
    )
    overwrite: bool = Field(False, description="replace an existing output and discard an unfinished one")
    quiet: bool = Field(False, description="no progress bar and no summary")
    strict: bool = Field(False, description="make warnings errors: nothing that one is about gets its name")

    def resolved_device(self) -> str:
        """The device to compute on.

        Raises:
            RequestError: a CUDA device was asked for and is not there.
        """
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device != "cpu":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            got = f"{count} of them"
            if int(self.device.partition(":")[2] or 0) >= count:
                raise RequestError(Offence("--device", self.device, "a CUDA device", got, "use --device cpu"))
        return self.device


def build(model: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Validate `values` as `model`; None means "not given".

    Raises:
        RequestError: an option is unknown, missing or out of range; all offenders.
    """
    try:
        return model(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise RequestError([_offence(where, details) for details in error.errors()]) from None


def fields_of(*models: type[Options]) -> dict[str, FieldInfo]:
    """The fields of models by name, required ones first."""
    fields = [item for model in models for item in model.model_fields.items()]
    return dict(sorted(fields, key=lambda item: not item[1].is_required()))


def _encodable(text: str) -> bool:
    try:
        return bool(os.fsencode(text)) or not text
    except UnicodeEncodeError:
        return False


def flag(name: str) -> str:
    """An option as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def _offence(where: str, details: Any) -> Offence:
    field = ".".join(str(part) for part in details["loc"])
    option = flag(field) if field and not where else field
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if details["type"] in ("missing", "nowhere"):
        return Offence(where or option, option if where else "", "a value", "nothing", "give it")
    if details["type"] == "extra_forbidden":
        return Offence(
            where or option, option if where else "", "a known option", "an unknown one", "check the spelling"
        )
    if details["type"] == "value_error":
        return Offence(where or message, message if where else "")  # a whole sentence
    known = EXPECTED.get(details["type"])
    expected = known.format_map(details.get("ctx", {})) if known else re.split(", (?:unable|got) ", message)[0]
    return Offence(where or option, option if where else "", expected, _shown(details["input"]), "")


def _shown(value: Any) -> str:
    """The beginning of a value's repr; of a number with thousands of digits Python makes none."""
    try:
        return without_secrets(_LOST_SLASH.sub(r"\1://", repr(value)))[:80]
    except ValueError:
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def keywords_of(*models: type[Options]) -> Callable[[F], F]:
    """Show the fields of models as the keywords of a function, in place of its `**options`: signature and docstring."""

    def with_signature(function: F) -> F:
        hints = {name: hint for model in models for name, hint in get_type_hints(model).items()}
        keywords = {
            name: Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.is_required() else field.default,
                annotation=hints[name],
            )
            for name, field in fields_of(*models).items()
        }
        given = signature(function)
        own = {name: p for name, p in given.parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
        parameters = sorted((keywords | own).values(), key=lambda p: p.kind)
        function.__signature__ = Signature(parameters, return_annotation=given.return_annotation)  # type: ignore[attr-defined]
        described = {name: field.description for name, field in fields_of(*models).items() if name not in own}
        function.__doc__ = _with_arguments(cleandoc(function.__doc__ or ""), described)
        return function

    return with_signature


def _with_arguments(doc: str, described: Mapping[str, str | None]) -> str:
    """A docstring whose Args end with what options mean, in place of the line that says where they are described."""
    lines = [line for line in doc.splitlines() if not line.startswith("    options: ")]
    head = [] if "Args:" in lines else ["", "Args:"]
    entries = (
        fill(f"{name}: {text}.", width=116, initial_indent="    ", subsequent_indent="        ")
        for name, text in described.items()  # in lines that api.pyi indents by 4 more
    )
    return "\n".join([*lines, *head, *entries])
