"""What transformers calls a checkpoint's tensors once it has loaded them, where that is another name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from safeshard.streamer.extras import require_transformers

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
