"""Which modules are treated in one step: each for itself, but for experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from safeshard.streamer.plan.job_plan import Weight

if TYPE_CHECKING:
    from safeshard.streamer.run.flow.tasks import ModuleTask

BUNDLE_BYTES = 128 << 20  # of experts that are treated together: those of fused LoRA are read once for all of them
NEAR_BYTES = 16 << 20  # of those that read nothing in common, on a CPU: it finds what was read for them in its caches
EXPERTS = ".experts."


def bytes_apart(device: torch.device) -> int:
    """The bytes of a step of experts that read nothing in common: a CUDA device is waited for once a step."""
    return BUNDLE_BYTES if device.type == "cuda" else NEAR_BYTES


def bundles(tasks_of: Mapping[str, Sequence[ModuleTask]], apart: int = BUNDLE_BYTES) -> Iterator[list[str]]:
    """Names of modules to treat in one step, in the order given.

    Modules that see one region (gate and up of an expert, where both lie in a block) are never parted, so that it is
    read once; experts are treated several at a time, as long as they are small: `apart` bytes of those that share no
    tensor with others, else `BUNDLE_BYTES`.
    """
    reads_of = {name: {r.key: r.ref.nbytes for task in tasks for r in task.reads()} for name, tasks in tasks_of.items()}
    readers = Counter(key for reads in reads_of.values() for key in reads)
    bundle: list[str] = []
    path, blocks, reads, shares = "", set[Hashable](), dict[Hashable, int](), False
    for name, tasks in tasks_of.items():
        seen = {block for task in tasks for block in _shared_blocks(task)}
        more = reads_of[name]
        experts = name.partition(EXPERTS)[0] if EXPERTS in name else name
        also = any(readers[key] > 1 for key in more)
        limit = BUNDLE_BYTES if shares or also else apart
        if bundle and not seen & blocks and (experts != path or sum((reads | more).values()) > limit):
            yield bundle
            bundle, blocks, reads, shares = [], set(), {}, False
        path, blocks, reads, shares = experts, blocks | seen, reads | more, shares or also
        bundle.append(name)
    if bundle:
        yield bundle


def _shared_blocks(task: ModuleTask) -> Iterator[Hashable]:
    """The regions of weights of which a module sees only a part."""
    for place in task.places():
        if isinstance(place, Weight):
            for part in place.stored.parts:
                if part.view.rows or part.view.columns:
                    yield (place.source.identity, part.block)
