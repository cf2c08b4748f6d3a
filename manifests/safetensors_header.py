"""The header of a safetensors file: read strictly, and laid out before the data is written.

A file is 8 bytes of header length (little endian), a JSON header of that length, then the tensors' bytes. Everything
that is read from a header is checked here, so the rest of the project may trust it: names are unique, sizes match
shapes and dtypes, and tensors cover the data region without gap or overlap.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safeshard.manifests.bounded import MAX_TENSORS, MAX_VALUES, refuse_many
from safeshard.manifests.errors import printable

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_NAME_CHARS = 8192  # far beyond any in use: what walks the parts of a name stays bounded
MAX_DIMENSIONS = 64  # torch's; it also bounds the arithmetic that a hostile shape can cause
# In the library's order, by which it also lays tensors out: the last dtype comes first in a file.
ITEM_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_LAYOUT_RANK = {dtype: -rank for rank, dtype in enumerate(ITEM_BITS)}


class HeaderError(ValueError):
    """A header that breaks the format. `tensor` is the offender, "" where it is the file."""

    def __init__(self, expected: str, got: str, tensor: str = "") -> None:
        super().__init__(expected, got, tensor)
        self.expected, self.got, self.tensor = expected, got, tensor

    def __str__(self) -> str:
        return printable(f"{self.tensor}: " * bool(self.tensor) + f"expected {self.expected}, got {self.got}")


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: `nbytes` bytes at `offset`, counted from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors by name, the file's metadata, and the header's own bytes (length prefix included)."""

    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    raw: bytes


# How files begin that lie under the name of another.
_OTHERS = {
    b"version ": "a pointer of Git LFS, which `git lfs pull` replaces by the file",
    b"<!doctyp": "a web page",
    b"<html": "a web page",
    b"gguf": "GGUF, llama.cpp's format",
    b"pk\x03\x04": "a ZIP archive, as pickles are",
    b'{"error"': "an error that a server answered",
}


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Parse the header of `file`, which holds `size` bytes; `read(start, stop)` returns its bytes in that range.

    Raises:
        HeaderError: the file is truncated, is no safetensors file, or contradicts itself.
    """
    if size < 8:
        raise HeaderError("a safetensors file", f"{size} bytes")
    prefix = read(0, 8)
    length = int.from_bytes(prefix, "little")
    data_start = 8 + length
    if length > MAX_HEADER_BYTES or data_start > size:
        known = next((what for start, what in _OTHERS.items() if prefix.lower().startswith(start)), None)
        if known is not None:
            raise HeaderError("a safetensors file", known)
    if length > MAX_HEADER_BYTES:
        raise HeaderError("a safetensors file", f"a header length of {length} bytes")
    if data_start > size:
        raise HeaderError(f"a header that ends at byte {data_start}", f"{size} bytes in the file (truncated)")
    text = read(8, data_start)
    table = _parse(text)
    if len(table) > MAX_TENSORS + 1:
        raise HeaderError(f"at most {MAX_TENSORS} tensors", f"{len(table)}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("an object of strings", "something else", "__metadata__")
    tensors = {name: _tensor(name, entry, file, data_start) for name, entry in table.items()}
    _check_cover(tensors.values(), data_start, size)
    return Header(tensors, metadata, prefix + text)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        refuse_many(text)
    except ValueError as error:
        raise HeaderError(f"a header of at most {MAX_VALUES} values", str(error)) from None
    try:
        table = json.loads(text.decode(), object_pairs_hook=_unique)
        if isinstance(table, dict):
            "".join(table).encode()  # escapes can smuggle in lone surrogates, which no file or journal can hold
    except HeaderError:
        raise
    except UnicodeError:
        raise HeaderError("a JSON object", "a header that is not valid UTF-8") from None
    except (ValueError, RecursionError):
        raise HeaderError("a JSON object", "a header that is not valid JSON") from None
    if not isinstance(table, dict):
        raise HeaderError("a JSON object", f"a header that holds a {type(table).__name__}")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise HeaderError("unique names", "the same name twice", key)
        table[key] = value
    return table


def _tensor(name: str, entry: Any, file: str, data_start: int) -> TensorRef:
    if len(name) > MAX_NAME_CHARS:
        raise HeaderError(f"a name of at most {MAX_NAME_CHARS} characters", f"{len(name)} characters", name[:80])
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise HeaderError("dtype, shape and two data_offsets", "another entry", name) from None
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise HeaderError("a dtype of the safetensors format", repr(dtype)[:80], name)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"a shape of at most {MAX_DIMENSIONS} sizes", repr(shape)[:80], name)
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise HeaderError("sizes and offsets that are whole numbers from 0 to 2^63 - 1", repr(entry)[:200], name)
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if (end - begin) * 8 != bits:
        raise HeaderError(f"{_bytes(bits)} bytes for {dtype} {shape}", f"{end - begin}", name)
    return TensorRef(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _bytes(bits: int) -> str:
    """Exact where it is a file's size; a hostile shape's product is too large for a float, or for decimal digits."""
    return f"{bits / 8:.16g}" if bits < 2**70 else "more than 2^67"


def _check_cover(tensors: Iterable[TensorRef], data_start: int, size: int) -> None:
    position = data_start
    for ref in sorted(tensors, key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != position:
            fault = "an overlap" if ref.offset < position else "a gap"
            raise HeaderError(f"to begin at byte {position} of the file", f"{ref.offset} ({fault})", ref.name)
        position += ref.nbytes
    if position != size:
        fault = "truncated" if size < position else "trailing bytes"
        raise HeaderError(f"{position} bytes in the file", f"{size} ({fault})")


def layout(
    file: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorRef]]:
    """Lay out a new file for (name, dtype, shape) triples with unique names.

    The header is, byte for byte, the safetensors library's: tensors by dtype, then by name; padded to 8 bytes.

    Returns:
        The header's bytes, length prefix included, and where each tensor goes.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    places = []
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (_LAYOUT_RANK[tensor[1]], tensor[0])):
        nbytes = math.prod(shape) * ITEM_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, position + nbytes)}
        places.append((name, dtype, shape, position, nbytes))
        position += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    refs = {
        name: TensorRef(name, dtype, shape, file, len(header) + begin, nbytes)
        for name, dtype, shape, begin, nbytes in places
    }
    return header, refs


def header_digest(header: bytes) -> str:
    """SHA-256 of a header as it lies in the file, its length prefix included."""
    return hashlib.sha256(header).hexdigest()
