"""Where a checkpoint or adapter lies: a folder, a Hub repository, or an fsspec URL.

A source lists its files once, reads byte ranges of them, and fetches nothing that is not asked for. Names come from
index files and are hostile: only listed files can be read, and a local file must lie inside its folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from safeshard.streamer.sources.base import MAX_JSON_BYTES, Source, read_json, reason, refuse
from safeshard.streamer.sources.hub import HUB_NAME, open_hub, pinned
from safeshard.streamer.sources.local import LocalSource
from safeshard.streamer.sources.url import UrlSource

__all__ = ["MAX_JSON_BYTES", "LocalSource", "Source", "is_url", "open_source", "pinned", "read_json"]


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Resolve a folder, `hf://org/name@revision` (or `org/name`), or an fsspec URL.

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
    if text.startswith("hf://") or (not exists and HUB_NAME.fullmatch(text)):
        return open_hub(text)
    if is_url(text):
        return UrlSource(text)
    got = "a file" if exists and text else "no such folder"
    raise refuse(text, "a folder, hf://org/name or a URL", got, "name the folder that holds the safetensors files")


def is_url(spec: str) -> bool:
    """Whether a place that is no local folder is opened by fsspec."""
    return "://" in spec and not spec.startswith(("file://", "hf://"))
