"""The manifest of a finished output, wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path

from safeshard.manifests.schema import Manifest, load
from safeshard.streamer.options import written_place


def manifest_of(output: str | os.PathLike[str]) -> Manifest:
    """The manifest of a finished output: a folder, s3://, gs://, az:// or hf://org/name.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    place = written_place(output)
    if isinstance(place, Path):
        return load(place)
    from safeshard.streamer.recheck.afar import Afar  # a local one is shown without waiting for what opens others

    return Afar(place).load()
