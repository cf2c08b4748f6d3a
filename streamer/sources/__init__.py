"""Where a checkpoint or adapter lies: a folder, a Hub repository, or an fsspec URL.

A source lists its files once, reads byte ranges of them, and fetches nothing that is not asked for. Names come from
index files and are hostile: only listed files can be read, and a local file must lie inside its folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from safeshard.streamer.sources.base import MAX_JSON_BYTES, Source, in_parallel, read_json, reason, refuse, side_by_side
from safeshard.streamer.sources.bucket import SCHEMES, BucketSource, has_obstore
from safeshard.streamer.sources.http import PIECE
from safeshard.streamer.sources.hub import HUB_NAME, ShardCache, hub_cache, open_hub, pinned
from safeshard.streamer.sources.local import LocalSource
from safeshard.streamer.sources.matching import is_pattern, matching
from safeshard.streamer.sources.url import UrlSource
from safeshard.streamer.sources.web import WebSource

__all__ = [
    "MAX_JSON_BYTES", "PIECE", "LocalSource", "ShardCache", "Source", "hub_cache", "in_parallel", "is_pattern",
    "is_url", "matching", "open_source", "pinned", "read_json", "side_by_side",
]  # fmt: skip


def open_source(spec: str | os.PathLike[str], cache: ShardCache | None = None) -> Source:
    """Resolve a folder, `hf://org/name@revision/folder` (or `org/name`), or a URL.

    `cache` says which shards of the Hub to keep; without one they are read by ranges, or from the Hub's cache.

    Raises:
        RequestError: nothing of the kind is there, or it cannot be listed.
    """
    text = os.fspath(spec)
    try:
        path = Path(text.removeprefix("file://"))
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long, not permitted, a null byte
        raise refuse(text, "a folder, hf://org/name or a URL", reason(error), "correct the path") from error
    if text and is_folder:
        return LocalSource(path, text)
    if not exists and HUB_NAME.fullmatch(text) and len(path.parts) > 2 and path.parent.is_dir():
        remedy = f"correct the name; of the Hub it is hf://{text}"
        raise refuse(text, "a folder, hf://org/name or a URL", f"no such folder in {path.parent}", remedy)
    if text.startswith("hf://") or (not exists and HUB_NAME.fullmatch(text)):
        return open_hub(text, cache or ShardCache())
    if is_url(text):
        return _open_url(text)
    got = "a file" if exists and text else "no such folder"
    if exists and path.suffix == ".gguf":
        raise refuse(text, "a folder, hf://org/name or a URL", "a GGUF file", "use the model that it was made from")
    remedy = (
        f"name its folder: {path.parent}" if exists and text else "name the folder that holds the safetensors files"
    )
    raise refuse(text, "a folder, hf://org/name or a URL", got, remedy)


def _open_url(url: str) -> Source:
    scheme = urlsplit(url).scheme.lower()
    if scheme in ("http", "https"):
        return WebSource(url)
    if scheme in SCHEMES and has_obstore():
        return BucketSource(url)
    return UrlSource(url)


def is_url(spec: str) -> bool:
    """Whether a place is a URL: neither a local folder nor a repository of the Hub."""
    return "://" in spec and not spec.startswith(("file://", "hf://"))
