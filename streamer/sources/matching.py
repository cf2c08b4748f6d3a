"""Places by pattern: folders of this machine, of a bucket's prefix, and repositories of a namespace of the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from safeshard.manifests.errors import RunError
from safeshard.streamer.extras import require
from safeshard.streamer.sources.base import refuse
from safeshard.streamer.sources.bucket import SCHEMES, open_store
from safeshard.streamer.sources.remote import OPENING, Line

T = TypeVar("T")
_WILD = re.compile(r"[*?\[]")


def is_pattern(place: str) -> bool:
    """Whether a place has wildcards (in a URL `*` alone), and is not the name of a folder that has them."""
    wild = "*" in place if "://" in place else _WILD.search(place) is not None
    return wild and not Path(place).expanduser().exists()


def matching(pattern: str) -> list[str]:
    """The places that match, in the order of their names: only the last part of a URL may have wildcards.

    Raises:
        RequestError: none does, or the place that holds them cannot be listed.
    """
    scheme, _, rest = pattern.partition("://")
    parent, _, last = pattern.rstrip("/").rpartition("/")
    if not rest:
        found = [path for path in sorted(glob.glob(os.path.expanduser(pattern))) if Path(path).is_dir()]  # noqa: PTH207, PTH111
    elif "*" in parent or "/" not in rest:
        raise refuse(pattern, "wildcards in the last part alone, as in s3://bucket/adapters/*", "others", "list them")
    elif scheme == "hf":
        names = _repositories(pattern, parent.removeprefix("hf://"))
        found = [f"hf://{name}" for name in sorted(names) if fnmatchcase(name.rpartition("/")[2], last)]
    elif scheme in SCHEMES:
        found = [f"{parent}/{name}" for name in sorted(_prefixes(pattern, parent)) if fnmatchcase(name, last)]
    else:
        raise refuse(pattern, "a folder, s3://, gs://, az:// or hf://org/pattern", "another place", "list them")
    if not found:
        raise refuse(pattern, "at least one folder or repository that matches", "none", "correct the pattern")
    return found


def _prefixes(pattern: str, parent: str) -> set[str]:
    """The names of the folders in a bucket's prefix."""
    require("obstore", "buckets")
    listed = _listed(pattern, lambda: open_store(parent).list_with_delimiter()["common_prefixes"])
    return {str(prefix).rstrip("/").rpartition("/")[2] for prefix in listed}


def _repositories(pattern: str, author: str) -> set[str]:
    """The model repositories of a namespace that the token may see."""
    from huggingface_hub import HfApi

    return {model.id for model in _listed(pattern, lambda: list(HfApi().list_models(author=author)))}


def _listed(pattern: str, request: Callable[[], T]) -> T:
    try:
        return Line().call(pattern, request, OPENING)
    except RunError as error:
        got = error.message.removeprefix(f"{pattern}: ")
        raise refuse(pattern, "a place that can be listed", got, error.remedy) from error
