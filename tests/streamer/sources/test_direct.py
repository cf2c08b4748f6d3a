"""Reads past the page cache: the same bytes as through it, wherever they lie and however they come."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources import open_source
from safeshard.streamer.sources.direct import (
    BLOCK,
    BOUNCE,
    LEAST,
    PIECE,
    blocks,
    into_room,
    open_direct,
    pieces,
    room_of,
)
from safeshard.streamer.sources.local import LocalSource

SIZE = 3 * LEAST + 1234
DATA = random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LocalSource:
    folder = tmp_path_factory.mktemp("direct")
    (folder / "f").write_bytes(DATA)
    source = open_source(folder)
    assert isinstance(source, LocalSource)
    source.direct = True
    assert source.takes_direct("f")
    return source


places = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(places, st.integers(0, 63))
def test_bytes_are_those_of_the_file(source: LocalSource, place: list[int], shift: int) -> None:
    start, stop = place
    room = blocks(room_of(stop - start))
    begin = into_room(source, "f", start, stop - start, room[: room_of(stop - start)])
    assert room[begin : begin + stop - start] == DATA[start:stop]
    memory = bytearray(b"\xaa" * (stop - start + 128))
    source.readinto("f", start, memoryview(memory)[shift : shift + stop - start])
    assert memory == b"\xaa" * shift + DATA[start:stop] + b"\xaa" * (128 - shift)


@settings(max_examples=30, deadline=None)
@given(places, st.integers(1, 3 * LEAST))
def test_pieces_are_the_bytes_in_order(source: LocalSource, place: list[int], length: int) -> None:
    start, stop = place
    length = max(length, (stop - start) // 50 + 1)
    taken = [bytes(piece) for piece in pieces(source, "f", start, stop - start, length)]
    assert b"".join(taken) == DATA[start:stop]
    assert all(len(piece) == length for piece in taken[:-1])
    assert len(taken) == max(1, -(-(stop - start) // length))


def test_a_block_around_it_is_all_that_a_read_takes_besides(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = count_reads(monkeypatch)
    for offset, nbytes in ((0, LEAST), (1, LEAST), (BLOCK - 1, LEAST + 2), (BLOCK + 8, 2 * LEAST)):
        asked.clear()
        into_room(source, "f", offset, nbytes, blocks(room_of(nbytes)))
        assert nbytes <= sum(asked) <= nbytes + 2 * BLOCK
        assert all(each % BLOCK == 0 for each in asked)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []
    preadv = os.preadv

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        asked.append(sum(map(len, views)))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return asked


@pytest.mark.parametrize("most", [512, BLOCK, BLOCK + 512, 100 * BLOCK - 512, 1 << 20])
def test_reads_cut_short(source: LocalSource, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A system may give less than was asked, down to what is no whole block."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: max(most, at % 512)]], at))
    room = blocks(room_of(LEAST))
    begin = into_room(source, "f", 777, LEAST, room)
    assert room[begin : begin + LEAST] == DATA[777 : 777 + LEAST]


def test_reads_interrupted_by_signals(source: LocalSource) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for _ in range(20):
            room = blocks(room_of(SIZE))
            begin = into_room(source, "f", 0, SIZE, room)
            assert room[begin : begin + SIZE] == DATA
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came


READS: dict[str, Callable[[LocalSource], object]] = {
    "room": lambda source: into_room(source, "f", 5, SIZE - 5, blocks(room_of(SIZE))),
    "aside": lambda source: source.readinto("f", 5, memoryview(bytearray(SIZE - 5))),
    "pieces": lambda source: list(pieces(source, "f", 5, SIZE - 5, LEAST)),
}


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("left", [0, LEAST + 5, SIZE - 1])
def test_a_file_that_has_shrunk(tmp_path: Path, way: str, left: int) -> None:
    (tmp_path / "f").write_bytes(DATA)
    source: Any = open_source(tmp_path)
    source.direct = True
    assert source.takes_direct("f")
    os.truncate(tmp_path / "f", left)
    with pytest.raises(RunError, match=f"has nothing at byte {max(left, 5)} of [0-9]+ expected: it is truncated"):
        READS[way](source)


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_file_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    refuse_direct(monkeypatch, when)
    (tmp_path / "f").write_bytes(DATA)
    before = set(Path("/proc/self/fd").iterdir())
    assert open_direct(tmp_path / "f") is None
    assert set(Path("/proc/self/fd").iterdir()) == before
    source: Any = open_source(tmp_path)
    source.direct = True
    assert not source.takes_direct("f")
    for read in READS.values():
        read(source)
    room = blocks(room_of(SIZE))
    assert into_room(source, "f", 5, LEAST, room) == 0
    assert room[:LEAST] == DATA[5 : 5 + LEAST]


def refuse_direct(monkeypatch: pytest.MonkeyPatch, when: str = "opened") -> None:
    """Let the system refuse reads past the page cache: as tmpfs did when opening, or as some do when reading."""
    system_open, preadv, direct = os.open, os.preadv, set[int]()

    def refusing_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and when == "opened":
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        fd = system_open(path, flags & ~os.O_DIRECT, *args, **more)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refusing_read(fd: int, views: Any, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_read)


def test_a_disk_that_fails_is_no_refusal(source: LocalSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(RunError, match=r"f: reading failed: .*Input/output error"):
        into_room(source, "f", 0, LEAST, blocks(room_of(LEAST)))


def test_memory_is_of_whole_blocks() -> None:
    for nbytes in (LEAST, LEAST + 1, LEAST + BLOCK - 1, 10 * LEAST + 7):
        assert room_of(nbytes) % BLOCK == 0
        assert max(-(-(head + nbytes) // BLOCK) * BLOCK for head in (0, 1, BLOCK - 1)) <= room_of(nbytes)
    assert PIECE % BLOCK == BOUNCE % BLOCK == 0
    assert BOUNCE >= BLOCK
