import hashlib
import os
import struct
from pathlib import Path

import pytest
from blake3 import blake3

from safeshard.manifests import hash_bytes, hash_tensor_region, header_sha256
from safeshard.manifests.hashing import CHUNK_BYTES


def test_hash_of_nothing_is_the_published_vector() -> None:
    assert hash_bytes(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_buffers_of_every_kind_hash_alike() -> None:
    content = bytes(range(256)) * 3
    assert hash_bytes(bytearray(content)) == hash_bytes(memoryview(content)) == blake3(content).hexdigest()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (3, 1), (5, CHUNK_BYTES), (1, 2 * CHUNK_BYTES + 7)])
def test_region_equals_its_slice_and_progress_adds_up(tmp_path: Path, offset: int, nbytes: int) -> None:
    content = bytes(i * i % 251 for i in range(2 * CHUNK_BYTES + 16))
    (tmp_path / "f").write_bytes(content)
    steps: list[int] = []
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        got = hash_tensor_region(fd, offset, nbytes, steps.append)
        with pytest.raises(EOFError, match="1 bytes early"):
            hash_tensor_region(fd, len(content) - 4, 5)
    finally:
        os.close(fd)
    assert got == blake3(content[offset : offset + nbytes]).hexdigest()
    assert sum(steps) == nbytes


def test_header_hash_covers_the_length_and_the_header() -> None:
    header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}  '
    assert header_sha256(header) == hashlib.sha256(struct.pack("<Q", len(header)) + header).hexdigest()
