"""The header of one safetensors file of an input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

from safeshard.manifests.bounded import MAX_TENSORS
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import Header, HeaderError, TensorRef, header_digest, read_header
from safeshard.manifests.schema import InputFile
from safeshard.streamer.inputs.samples import sample_file
from safeshard.streamer.sources import Source, in_parallel


@dataclass(frozen=True)
class FileHeader:
    """A safetensors file by its header. `sha256` is of the header's bytes, length prefix included."""

    source: Source = field(repr=False)
    name: str
    sha256: str
    tensors: tuple[TensorRef, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.source.sizes()[self.name]

    @cached_property
    def sample(self) -> str:
        """The hash of its content that `sample_file` makes; read once."""
        return sample_file(self.source, self.name, self.tensors)

    @property
    def entry(self) -> InputFile:
        """What the manifest says of it. A commit pins the content of a Hub repository's: nothing is read of that."""
        sample = self.sample if self.source.revision is None else None
        return InputFile(name=self.name, size=self.size, header_sha256=self.sha256, sample_blake3=sample)


def file_header(source: Source, name: str, header: Header) -> FileHeader:
    """A file of a source, described by its header."""
    return FileHeader(source, name, header_digest(header.raw), tuple(header.tensors.values()))


def read_file_header(source: Source, name: str) -> Header:
    """Read one file's header.

    Raises:
        RequestError: the header is wrong.
    """
    headers, offences = read_headers(source, [name], source.sizes())
    if offences:
        raise RequestError(offences)
    return headers[name]


def read_headers(
    source: Source, names: Iterable[str], sizes: Mapping[str, int]
) -> tuple[dict[str, Header], list[Offence]]:
    """The headers of files by name, those that lie far away side by side; and the offences of those that are wrong."""

    count = 0  # of tensors in the files read so far

    def read(name: str) -> Header | Offence:
        nonlocal count
        if count > MAX_TENSORS:
            return Offence(source.spec, "", f"at most {MAX_TENSORS} tensors in all files", "more", "check the files")
        try:
            header = read_header(name, sizes[name], partial(source.read, name))
            count += len(header.tensors)
            return header
        except HeaderError as error:
            source.local_path(name)  # a damaged copy in a cache says so itself, and where it lies
            where, remedy = f"{source.spec}/{name}", "fetch or save the file again"
            return Offence(where, error.tensor, error.expected, error.got, remedy)

    names = list(names)
    found = dict(zip(names, in_parallel(source, read, names), strict=True))
    headers = {name: header for name, header in found.items() if isinstance(header, Header)}
    return headers, list(dict.fromkeys(offence for offence in found.values() if isinstance(offence, Offence)))
