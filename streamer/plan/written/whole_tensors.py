"""Tensors that an adapter carries whole: are they the aligned model's own, or were they trained?

PEFT stores embeddings and head whole in every adapter once the vocabulary was resized, trained or not. So their values
are compared: this reads both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import FLOATS, Checkpoint
from safeshard.streamer.inputs.compare import Difference, row_difference

Whole = Mapping[str, Difference]  # by key in the adapter; without what the aligned model has no plain tensor for


def compare_whole(adapter: Adapter, aligned: Checkpoint) -> dict[str, Difference]:
    """How the tensors that an adapter carries whole differ from the aligned model's.

    Raises:
        RunError: reading failed.
    """
    return {
        key: row_difference((aligned.source, ref), (adapter.source, adapter.saved[key]))
        for key, ref in adapter.places.items()
        if ref.dtype in FLOATS and ref.name not in aligned.encoded_tensors
    }


def describe(difference: Difference | None) -> str:
    """What was found, in words."""
    if difference is None:
        return "the aligned model has nothing to compare it with"
    count = abs(difference.added)
    more = f"{count} {'row' if count == 1 else 'rows'} {'more' if difference.added > 0 else 'fewer'}"
    if difference.equal:
        return f"equal to the aligned one but for {more}" if difference.added else "equal to the aligned one"
    rows = (
        f"{difference.rows} of {difference.common} rows differ from the aligned one's by up to {difference.largest:.3g}"
    )
    return f"trained: {rows}" + (f", and it has {more}" if difference.added else "")


def safe_offences(safe: Adapter, whole: Whole) -> Iterator[Offence]:
    """Offences of tensors that were trained in the safe adapter: there is no rule to merge them by."""
    for key in sorted(safe.saved):
        difference = whole.get(key)
        if difference is not None and not difference.equal and ".base_layer." not in key:
            remedy = "train the safe adapter without it among modules_to_save, or merge both adapters into checkpoints"
            yield Offence(f"{safe.source.spec}", key, "the aligned model's values", describe(difference), remedy)


def safe_notes(safe: Adapter, whole: Whole) -> Iterator[Fallback]:
    """What becomes of a safe adapter's whole tensors."""
    for key in sorted(safe.saved):
        why = f"{describe(whole.get(key))} ({safe.source.spec})"
        yield Fallback(asked="the safe adapter's tensor", done="left out", why=why, subject=key)
