"""Quantised weights on their way out: which blocks may stay as they are, and what the manifest says of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from safeshard.streamer.inputs.codecs.base import Encoded
from safeshard.streamer.inputs.layouts import Part
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.plan.job_plan import ModulePlan, Weight


def known_parts(plan: ModulePlan, part: Part, load: Callable[[Read], Tensor]) -> list[dict[str, Tensor]]:
    """What the aligned weight has in a region, then the fine-tuned one, where it is of the same format."""
    assert plan.aligned is not None
    number = next(n for n, each in enumerate(plan.aligned.stored.parts) if each.block == part.block)
    found = []
    for place in (plan.aligned, plan.finetuned):
        theirs = place.stored.parts[number : number + 1] if isinstance(place, Weight) else ()
        for each in (each for each in theirs if _form(each) == _form(part)):
            assert isinstance(place, Weight)
            found.append({name: load(Read(place.source, ref)).cpu() for name, ref in each.refs.items()})
    return found


def encoding_fields(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """What a module's entry says of the regions that were encoded."""
    if not encoded:
        return {}
    norm = sum(each.norm for each in encoded)
    error = math.sqrt(sum(each.error for each in encoded) / norm) if norm else 0.0
    blocks, changed = sum(each.blocks for each in encoded), sum(each.changed for each in encoded)
    return {"blocks": blocks, "blocks_changed": changed, "encoding_error": error}


def _form(part: Part) -> Any:
    return part.codec, part.stored, part.view, {name: (ref.dtype, ref.shape) for name, ref in part.refs.items()}
