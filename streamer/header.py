"""The safetensors header: read strictly, written before the data.

A file is 8 bytes of header length (little endian), a JSON header of that length, then the tensors' bytes. Everything
that is read from a header is checked here, so the rest of the project may trust it: names are unique, sizes match
shapes and dtypes, and tensors cover the data region without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class HeaderError(ValueError):
    """A header that breaks the format. `tensor` is the offender where there is one."""

    def __init__(self, problem: str, tensor: str = "", expected: str = "") -> None:
        super().__init__(problem)
        self.problem, self.tensor, self.expected = problem, tensor, expected


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file` (a name inside the source's folder)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors by name, the file's metadata, and the header's own bytes (length prefix included)."""

    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    raw: bytes


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Parse the header of `file`, which holds `size` bytes; `read(start, stop)` returns its bytes in that range.

    Raises:
        HeaderError: the file is truncated, is no safetensors file, or contradicts itself.
    """
    if size < 8:
        raise HeaderError(f"{size} bytes", expected="a safetensors file of at least 8 bytes")
    length = int.from_bytes(read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"header length {length}", expected=f"at most {MAX_HEADER_BYTES} (is it a safetensors file?)")
    if 8 + length > size:
        raise HeaderError(f"{size} bytes in the file", expected=f"a header that ends at byte {8 + length} (truncated?)")
    text = read(8, 8 + length)
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        problem = error.problem if isinstance(error, HeaderError) else "not valid JSON"
        raise HeaderError(f"header: {problem}", expected="a JSON object with unique keys") from None
    if not isinstance(table, dict):
        raise HeaderError("header is no JSON object", expected="a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError("__metadata__ is malformed", expected="an object of strings")
    tensors = {name: _tensor(name, entry, file, 8 + length) for name, entry in table.items()}
    _check_cover(tensors, 8 + length, size)
    return Header(tensors, metadata, length.to_bytes(8, "little") + text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise HeaderError("duplicate keys")
    return table


def _tensor(name: str, entry: Any, file: str, data: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise HeaderError("malformed entry", name, "dtype, shape, data_offsets") from None
    if dtype not in ITEM_BYTES:
        raise HeaderError(f"dtype {dtype!r}", name, "a dtype of the safetensors format")
    if not whole or not isinstance(shape, list):
        raise HeaderError("negative or fractional numbers", name, "sizes and offsets that are whole numbers >= 0")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise HeaderError(f"{end - begin} bytes", name, f"{expected} bytes for {dtype} {shape}")
    return TensorRef(name, dtype, tuple(shape), file, data + begin, expected)


def _check_cover(tensors: Mapping[str, TensorRef], data: int, size: int) -> None:
    position = data
    for ref in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if ref.offset != position:
            raise HeaderError(
                f"begins at byte {ref.offset}", ref.name, f"to begin at {position}, without gap or overlap"
            )
        position += ref.nbytes
    if position != size:
        word = "truncated" if size < position else "trailing bytes"
        raise HeaderError(f"{size} bytes in the file ({word})", expected=f"{position} bytes")


def layout(
    file: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorRef]]:
    """Lay out a new file for (name, dtype, shape) triples; return its header bytes and where each tensor goes.

    The order is the safetensors library's: wider dtypes first, then by name; the header is padded to 8 bytes.
    """
    order = sorted(tensors, key=lambda t: (-ITEM_BYTES[t[1]], t[0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in order:
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    refs = {
        name: TensorRef(
            name, dtype, shape, file, data + table[name]["data_offsets"][0], math.prod(shape) * ITEM_BYTES[dtype]
        )
        for name, dtype, shape in order
    }
    return len(text).to_bytes(8, "little") + text, refs


def header_digest(header: bytes) -> str:
    """SHA-256 of a header as it lies in the file, its length prefix included."""
    return hashlib.sha256(header).hexdigest()
