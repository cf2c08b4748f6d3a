"""What is left of a fine-tuned delta, as the manifest says it: module by module, and of all together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from safeshard.kernels.effect import Pair
from safeshard.kernels.tally import Tally
from safeshard.manifests.schema import Effect
from safeshard.streamer.inputs.read import TORCH_DTYPES
from safeshard.streamer.methods.base import Lora, Module


def total(entries: Iterable[Mapping[str, Any]]) -> Effect | None:
    """The effect on all modules together, from their manifest entries: as if they were one long vector."""
    before = after = inner = 0.0
    for entry in entries:
        each = entry.get("effect", {})
        if (norm := each.get("delta_norm")) and (kept := each.get("kept_norm")) is not None:
            before += norm * norm
            after += (kept * norm) ** 2
            inner += each.get("cosine", 0.0) * kept * norm * norm
    return effect(before, after, inner) if before else None


def written_pair(old: Lora, tensors: Mapping[str, Tensor], scaling: float, dtypes: Mapping[str, str]) -> Pair:
    """A pair that came in, and what is written as `dtypes`, to be read with `scaling`; a part without tensor stayed."""
    new = {part: tensors.get(part, given) for part, given in (("a", old.a), ("b", old.b))}
    kinds = {part: TORCH_DTYPES[dtype] for part, dtype in dtypes.items()}
    return Pair(old.a, old.b, old.scaling, new["a"], new["b"], scaling, kinds["a"], kinds["b"])


def measured_tiles(module: Module, tiles: Iterable[Tensor], dtype: str, tally: Tally) -> Iterator[Tensor]:
    """Tiles of a module's new tensor, in order; each is measured as it passes on its way to be written as `dtype`.

    The module's tensors are O x I and the tiles whole rows, or all are vectors.
    """
    aligned, tuned, kind = module.aligned, module.finetuned, TORCH_DTYPES[dtype]
    assert aligned is not None
    columns = aligned.shape[1] if aligned.ndim == 2 else 1
    start = 0
    for tile in tiles:
        for lo, hi in tally.take(tile.numel()):
            first, stop = lo // columns, -(-hi // columns)
            rows, part = slice(start + first, start + stop), slice(lo - first * columns, hi - first * columns)
            base, new = (t.reshape(-1)[part] for t in (aligned[rows], tile[first:stop].to(kind)))
            theirs = (
                tuned[rows] if isinstance(tuned, Tensor) else tuned.b[rows].float() * tuned.scaling @ tuned.a.float()
            )
            tally.add(base, theirs.reshape(-1)[part], new, tuned_is_delta=isinstance(tuned, Lora))
        start += len(tile)
        yield tile


def effect(before: float, after: float, inner: float) -> Effect:
    """The effect by its products; what a zero delta leaves undefined, or sums beyond fp32, are left out."""
    if not all(map(math.isfinite, (before, after, inner))):
        return Effect()
    if before <= 0:
        return Effect(delta_norm=0.0)
    norm, new = math.sqrt(before), math.sqrt(max(after, 0.0))
    cosine = max(-1.0, min(1.0, inner / (norm * new))) if new else None
    if before == after == inner:
        cosine = 1.0
    return Effect(kept_norm=new / norm, cosine=cosine, delta_norm=norm)
