"""The header of a safetensors file, read strictly: what verification needs of the format and no more."""

import json
import os
from dataclasses import dataclass
from typing import Any

MAX_HEADER_BYTES = 100_000_000


class HeaderError(Exception):
    """The file is no safetensors file, or its header is invalid."""


@dataclass(frozen=True)
class Region:
    """A tensor as the header describes it; `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(fd: int, size: int) -> bytes:
    """The 8 length bytes and the header they announce, of an open file of `size` bytes. Raises HeaderError."""
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise HeaderError("truncated, or not a safetensors file")
    return prefix + os.pread(fd, length, 8)


def parse_header(raw: bytes, size: int) -> dict[str, Region]:
    """Tensors by name, from what `read_header` gave.

    Raises HeaderError unless every entry is well-formed and together they tile the file's data, without holes or
    overlaps, up to its `size`.
    """
    try:
        header = json.loads(raw[8:], object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise HeaderError("its header is no JSON object")
        regions = {name: _region(info, len(raw)) for name, info in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise HeaderError(f"its header is invalid: {error}") from error
    end = len(raw)
    for region in sorted(regions.values(), key=lambda region: (region.offset, region.nbytes)):
        if region.offset != end or region.nbytes < 0:
            raise HeaderError("its tensors overlap or leave a hole")
        end += region.nbytes
    if end != size:
        raise HeaderError(f"its tensors end at byte {end}, the file at {size}")
    return regions


def _region(info: dict[str, Any], data_start: int) -> Region:
    dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    if not isinstance(dtype, str) or any(type(number) is not int for number in (*shape, begin, end)):
        raise ValueError("a field has the wrong type")
    return Region(dtype, shape, data_start + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key named twice")
    return dict(pairs)
