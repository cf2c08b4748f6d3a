"""Whether local files are read past the page cache: as asked, or measured where they are larger than memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from safeshard.streamer.sources import LocalSource, Source
from safeshard.streamer.sources.direct import PIECE, blocks, room_of

IO = Literal["auto", "direct", "buffered"]
NEAR_READERS, DIRECT_READERS, FAR_READERS = 2, 4, 8  # threads: past the page cache nothing reads ahead of them
PLACES = 8  # that are read to choose, each way every other
log = logging.getLogger(__name__)


def choose_reading(io: IO, sources: Iterable[Source]) -> None:
    """Set how each local source is read; no byte of an output depends on it.

    Where all that lies there fits the machine's memory, the page cache serves the next run, too: "auto" leaves it at
    that. A file system that refuses "direct" is read through the cache, which a warning says.
    """
    local = list({id(source): source for source in sources if isinstance(source, LocalSource)}.values())
    places: dict[int, list[LocalSource]] = {}
    for source in local:
        source.direct = False
        if shards(source):
            places.setdefault(source.folder.stat().st_dev, []).append(source)
    if io == "auto" and sum(_bytes(source) for source in _distinct(local)) <= memory_bytes():
        return
    for there in places.values() if io != "buffered" else ():
        if not there[0].takes_direct(shards(there[0])[0]):
            if io == "direct":
                log.warning(
                    "%s: its file system has no reads past the page cache (O_DIRECT): they go through it", there[0].spec
                )
        elif io == "direct" or is_faster(there):
            for source in there:
                source.direct = True


def readers_for(sources: Iterable[Source]) -> int:
    """How many threads read ahead of those who compute."""
    given = list(sources)
    if any(source.far for source in given):
        return FAR_READERS
    return DIRECT_READERS if any(isinstance(s, LocalSource) and s.direct for s in given) else NEAR_READERS


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_faster(sources: Sequence[LocalSource], now: Callable[[], float] = time.perf_counter) -> bool:
    """Whether reads past the page cache take no longer than through it, by a few of the largest files' places."""
    files = sorted(((source.sizes()[name], name, source) for source in sources for name in shards(source)), key=_size)
    size, name, source = files[-1]
    room, seconds = blocks(room_of(PIECE)), [0.0, 0.0]
    for index in range(PLACES):
        source.direct = bool(index % 2)
        start = now()
        source.readinto_room(name, max(0, size - PIECE) * index // PLACES, min(PIECE, size), room)
        seconds[index % 2] += now() - start
    source.direct = False
    return seconds[1] <= seconds[0]


def shards(source: LocalSource) -> list[str]:
    """The files of a source that hold weights."""
    return [name for name, size in source.sizes().items() if name.endswith(".safetensors") and size]


def _size(file: tuple[int, str, LocalSource]) -> int:
    return file[0]


def _bytes(source: LocalSource) -> int:
    return sum(source.sizes()[name] for name in shards(source))


def _distinct(sources: Iterable[LocalSource]) -> list[LocalSource]:
    return list({source.identity: source for source in sources}.values())
