import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from safeshard.manifests.safetensors_header import HeaderError, Region, parse_header, read_header

GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
    "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [8, 8]},
}


def raw_header(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def test_offsets_count_from_the_start_of_the_file() -> None:
    raw = raw_header(GOOD)
    assert parse_header(raw, len(raw) + 11) == {
        "b": Region("U8", (3,), len(raw) + 8, 3),
        "a": Region("BF16", (2, 2), len(raw), 8),
        "empty": Region("F32", (0, 7), len(raw) + 8, 0),
    }


def test_it_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "v": np.zeros((0, 4), np.int8), "s": np.float64(2.5)}
    content = safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}, {"format": "pt"})
    (tmp_path / "f").write_bytes(content)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        raw = read_header(fd, len(content))
    finally:
        os.close(fd)
    regions = parse_header(raw, len(content))
    assert content.startswith(raw)
    assert {name: (r.dtype, r.shape) for name, r in regions.items()} == {
        "w": ("F32", (2, 3)),
        "v": ("I8", (0, 4)),
        "s": ("F64", ()),
    }
    for name, region in regions.items():
        assert content[region.offset : region.offset + region.nbytes] == np.asarray(arrays[name]).tobytes()


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'"a"',
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "U8"}}',
        {"a": {}},
        entry(dtype=3),
        entry(shape=2),
        entry(shape=["2"]),
        entry(shape=[True]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0.0, 2.0]),
        entry(data_offsets=["0", "2"]),
        entry(data_offsets=[2, 0]),
        entry(data_offsets=[-2, 2]),
        entry(data_offsets=[1, 2]),
        entry(data_offsets=[0, 1]),
        entry(data_offsets=[0, 3]),
        entry(data_offsets=[0, 2**70]),
        {**entry(), "b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}},
    ],
)
def test_a_bad_header_is_refused(header: object) -> None:
    raw = raw_header(header)
    with pytest.raises(HeaderError):
        parse_header(raw, len(raw) + 2)


@pytest.mark.parametrize(
    "content",
    [b"", b"\1\0\0", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**63) + b"{}", b"\x80\x02}q\x00X\x01\x00\x00"],
)
def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        with pytest.raises(HeaderError, match="truncated, or not"):
            read_header(fd, len(content))
    finally:
        os.close(fd)
