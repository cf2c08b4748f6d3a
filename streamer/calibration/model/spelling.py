"""The checkpoint's names of a model's tensors: by a prefix, and by what transformers renames as it loads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.extras import require_transformers
from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.tensor_names import layer_of

_ONE_EXPERT = re.compile(r"\.experts\.\d")


def renamed(model: Any, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each tensor's name and the one that transformers' own tables give it in `model`; those of experts are left out.

    Only what is renamed as a whole: tensors that are cut or put together keep their names.
    """
    require_transformers()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before release 5 models are called what their checkpoints say
        return
    changes = [c for c in get_model_conversion_mapping(model, add_legacy=False) if type(c) is WeightRenaming]
    for name in names:
        if _ONE_EXPERT.search(name):
            continue
        theirs = name
        for change in changes:
            theirs, _ = change.rename_source_key(theirs)
        yield name, theirs


def spelling(folder: Path, needed: set[str], present: set[str], base: str, prefix: str) -> tuple[str, str]:
    """(prefix to strip, prefix to add) that turn the model's tensor names into the checkpoint's.

    `base` is what the model's own names begin with, `prefix` what they may begin with. Where neither finds all, the
    language model stands inside another, and its path is where the tensors of the first layer are.
    """
    spellings = [("", ""), (prefix, ""), ("", prefix)]
    missing = _missing(spellings, needed, present)
    if all(missing.values()):
        inside = {(base, path) for path in _paths(needed, present, base)}
        missing |= _missing(inside, needed, present)
    fewest = min(map(len, missing.values()))
    best = [spelling for spelling, names in missing.items() if len(names) == fewest]
    if fewest:
        names = sorted(missing[best[0]])
        remedy = (
            "use the checkpoint that belongs to this config.json; if it is that, it stores tensors under other names "
            "than transformers', which calibration does not read: SafeMERGE, SafeLoRA and scale run no model"
        )
        raise RequestError([Offence(str(folder), name, "a tensor", "none", remedy) for name in names])
    if len(best) > 1 and best[0] not in spellings:
        paths = " or ".join(repr(path) for _, path in sorted(best))
        raise RequestError(Offence(str(folder), "", "one language model", f"tensors of it under {paths}"))
    return best[0]


def _missing(
    spellings: Collection[tuple[str, str]], needed: set[str], present: set[str]
) -> dict[tuple[str, str], list[str]]:
    return {
        (strip, add): [name for n in needed if (name := add + n.removeprefix(strip)) not in present]
        for strip, add in spellings
    }


def _paths(needed: set[str], present: set[str], base: str) -> set[str]:
    """What stands in the checkpoint before the names of the language model's first layer."""
    first = [name.removeprefix(base) for name in needed if layer_of(name) == 0]
    ends = [(name, name.removesuffix(tail)) for tail in first[:1] for name in present if name.endswith("." + tail)]
    return {path for name, path in ends if not part_of(name)}
