import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.manifests.safetensors_header import (
    ITEM_BITS,
    MAX_HEADER_BYTES,
    HeaderError,
    TensorRef,
    header_digest,
    layout,
    read_header,
)

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TABLES = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES), max_size=6)
METADATA = st.dictionaries(NAMES, NAMES, max_size=1)
GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
    "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [8, 8]},
}


def reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda start, stop: content[start:stop]


def encode(header: object, data: bytes = b"") -> bytes:
    """A file: `header` as JSON (bytes: as they are), then data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parse(content: bytes) -> dict[str, TensorRef]:
    return read_header("f", len(content), reader(content)).tensors


@given(TABLES, METADATA)
@settings(deadline=None, max_examples=100)
def test_what_the_library_writes_is_read_and_laid_out_alike(table: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in table.items()}
    content = safetensors.torch.save(tensors, metadata or None)
    header = read_header("f", len(content), reader(content))
    assert {name: (ref.dtype, ref.shape) for name, ref in header.tensors.items()} == table
    assert header.metadata == metadata
    assert content.startswith(header.raw)
    ours, places = layout("f", [(name, *entry) for name, entry in table.items()], metadata)
    assert (ours, places) == (header.raw, header.tensors)


@given(TABLES, METADATA, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_library_reads_what_is_laid_out(table: dict[str, Any], metadata: dict[str, str], random: Any) -> None:
    header, places = layout("f", [(name, *entry) for name, entry in table.items()], metadata)
    content = bytearray(header) + bytes(sum(ref.nbytes for ref in places.values()))
    for ref in places.values():
        content[ref.offset : ref.offset + ref.nbytes] = random.randbytes(ref.nbytes)
    loaded = dict(safetensors.deserialize(bytes(content)))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in loaded.items()} == table
    for name, ref in places.items():
        assert bytes(loaded[name]["data"]) == content[ref.offset : ref.offset + ref.nbytes]
    assert parse(bytes(content)) == places


@pytest.mark.parametrize("dtype", sorted(ITEM_BITS))
def test_every_dtype_has_the_library_s_size(dtype: str) -> None:
    content = encode(
        {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, ITEM_BITS[dtype]]}}, bytes(ITEM_BITS[dtype])
    )
    assert parse(content)["a"].nbytes == ITEM_BITS[dtype]
    assert len(safetensors.deserialize(content)) == 1


def test_offsets_count_from_the_start_of_the_file() -> None:
    content = encode(GOOD, bytes(11))
    start = len(content) - 11
    assert parse(content) == {
        "b": TensorRef("b", "U8", (3,), "f", start + 8, 3),
        "a": TensorRef("a", "BF16", (2, 2), "f", start, 8),
        "empty": TensorRef("empty", "F32", (0, 7), "f", start + 8, 0),
    }


def test_the_digest_covers_the_length_prefix() -> None:
    assert header_digest(struct.pack("<Q", 2) + b"{}") != header_digest(b"{}")


def test_truncation_at_any_byte_is_refused() -> None:
    content = encode(GOOD, bytes(11))
    for size in range(len(content)):
        with pytest.raises(HeaderError, match=r"expected .*got"):
            parse(content[:size])


@given(st.integers(8, 200), st.binary(min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_refused_or_means_the_same_to_the_library(position: int, patch: bytes) -> None:
    content = bytearray(encode(GOOD, bytes(11)))
    content[position : position + len(patch)] = patch
    try:
        ours = parse(bytes(content))
    except HeaderError:
        return
    loaded = safetensors.deserialize(bytes(content))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in loaded} == {
        name: (ref.dtype, ref.shape) for name, ref in ours.items()
    }


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}}


TWICE = b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "a": {"dtype": "U8", "shape": [0]}}'
BROKEN = {
    "nothing": (b"", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "not valid UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "not valid UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "lone surrogate": (rb'{"\ud800": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', "not valid UTF-8"),
    "deep nesting": (b"[" * 200_000, "not valid JSON"),
    "a number without end": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "list": (b"[]", "holds a list"),
    "string": (b'"a"', "holds a str"),
    "name twice": (TWICE, "a: expected unique names"),
    "key twice": (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [2]}}', "dtype: expected unique names"),
    "metadata no object": ({"__metadata__": [], **entry()}, "__metadata__: expected an object of strings"),
    "metadata no strings": ({"__metadata__": {"a": 1}, **entry()}, "__metadata__: expected an object of strings"),
    "entry a number": ({"a": 1}, "a: expected dtype, shape and two data_offsets"),
    "entry null": ({"a": None}, "a: expected dtype, shape and two data_offsets"),
    "entry a string": ({"a": "x"}, "a: expected dtype, shape and two data_offsets"),
    "entry empty": ({"a": {}}, "a: expected dtype, shape and two data_offsets"),
    "one offset": (entry(data_offsets=[0]), "a: expected dtype, shape and two data_offsets"),
    "offsets a number": (entry(data_offsets=2), "a: expected dtype, shape and two data_offsets"),
    "unknown dtype": (entry(dtype="F128"), "a: expected a dtype"),
    "dtype a number": (entry(dtype=3), "a: expected a dtype"),
    "dtype a list": (entry(dtype=[]), "a: expected a dtype"),
    "shape a number": (entry(shape=2), "a: expected a shape"),
    "shape a string": (entry(shape="2"), "a: expected a shape"),
    "too many dimensions": (entry(shape=[2] + [1] * 64), "a: expected a shape"),
    "sizes no numbers": (entry(shape=["2"]), "whole numbers"),
    "size true": (entry(shape=[2, True]), "whole numbers"),
    "size 2.0": (entry(shape=[2.0]), "whole numbers"),
    "size NaN": (entry(shape=[float("nan")]), "whole numbers"),
    "negative sizes": (entry(shape=[-1, -2]), "whole numbers"),
    "size 2^63": (entry(shape=[2**63, 0], data_offsets=[0, 0]), "whole numbers"),
    "product past 2^64": (entry(shape=[2**32, 2**32]), "bytes for U8"),
    "offsets strings": (entry(data_offsets=["0", "2"]), "whole numbers"),
    "offsets 2.0": (entry(data_offsets=[0.0, 2.0]), "whole numbers"),
    "offset false": (entry(data_offsets=[False, 2]), "whole numbers"),
    "negative offset": (entry(data_offsets=[-2, 0]), "whole numbers"),
    "offset 2^70": (entry(data_offsets=[2**70, 2**70 + 2]), "whole numbers"),
    "ends before it begins": (entry(data_offsets=[2, 0]), "a: expected 2 bytes for U8 .2., got -2"),
    "too few bytes": (entry(data_offsets=[0, 1]), "a: expected 2 bytes"),
    "too many bytes": (entry(shape=[1]), "a: expected 1 bytes"),
    "half a byte": (entry(dtype="F4", shape=[3]), "a: expected 1.5 bytes"),
    "gap": (entry(data_offsets=[1, 3]), "gap"),
    "overlap": ({**entry(), "b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, "b: .*overlap"),
    "data missing": (entry(shape=[3], data_offsets=[0, 3]), "truncated"),
    "trailing bytes": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "trailing bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused(kind: str) -> None:
    header, message = BROKEN[kind]
    with pytest.raises(HeaderError, match=message):
        parse(encode(header, bytes(2)))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_length_is_refused_unread(length: int) -> None:
    def read(start: int, stop: int) -> bytes:
        assert stop <= 8
        return struct.pack("<Q", length)

    with pytest.raises(HeaderError, match=f"header length of {length} bytes"):
        read_header("f", 2**64, read)


def test_a_pickle_is_refused() -> None:
    with pytest.raises(HeaderError, match="expected a safetensors file"):
        parse(b"\x80\x02}q\x00X\x01\x00\x00")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04" + bytes(30), "a ZIP archive"), (b"GGUF\x03\0\0\0" + b"\xff" * 20, "GGUF"),
    ],
)  # fmt: skip
def test_what_lies_under_the_name_of_another_is_named(start: bytes, expected: str) -> None:
    with pytest.raises(HeaderError, match=expected):
        read_header("f", len(start), lambda begin, end: start[begin:end])
