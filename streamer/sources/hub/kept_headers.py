"""Headers of shards on the Hub, kept between a dry run and the run: by the content's sha256, so they never go stale."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from safeshard.manifests.hashing import hash_bytes

KEPT_BYTES = 64 << 20  # of all headers; the oldest go first
MAX_HEADER = 8 << 20


def load_header(sha256: str) -> bytes:
    """The first bytes of a file as far as they were kept; b"" where they were not, or are damaged."""
    try:
        text = (folder() / sha256).read_bytes()
    except OSError:
        return b""
    digest, data = text[:64], text[64:]
    return data if digest == hash_bytes(data).encode() else b""


def keep_header(sha256: str, data: bytes) -> None:
    """Keep the first bytes of a file. Whatever goes wrong: it is only asked for again then."""
    if len(data) > MAX_HEADER:
        return
    with contextlib.suppress(OSError):
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        _make_room(place, len(data))
        unfinished = place / f"{sha256}.part"  # by its name: what a kill leaves is written over
        unfinished.write_bytes(hash_bytes(data).encode() + data)
        unfinished.replace(place / sha256)


def folder() -> Path:
    """Where they are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "safeshard" / "headers"


def _make_room(place: Path, nbytes: int) -> None:
    files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in place.iterdir()), key=lambda item: item[0])
    total = sum(size for _, size, _ in files) + nbytes
    for _, size, path in files:
        if total <= KEPT_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
