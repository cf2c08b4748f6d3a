"""Vocabularies of other sizes: a fine-tuned model with a pad token more, a release padded to a round number.

Rows that both models have are one token's, so methods compute with them. A row that one model alone has is no delta:
added rows of a fine-tuned model go along as they are, since its tokenizer gives out their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.inputs.names.unbuilt import text_config


def row_notes(title: str, name: str, aligned: TensorRef, tuned: TensorRef) -> Iterator[Fallback]:
    """What becomes of rows that one of two tensors lacks, where the other rows are computed with."""
    ours, theirs = aligned.shape[0], tuned.shape[0]
    if theirs > ours:
        done, why = f"{theirs - ours} added rows as the fine-tuned model has them", f"the aligned one has {ours} rows"
        yield Fallback(asked=title, done=done, why=why, subject=name)
    elif theirs < ours:
        done, why = f"{ours - theirs} rows left out", f"the fine-tuned model's vocabulary has {theirs}"
        yield Fallback(asked=title, done=done, why=why, subject=name)


def with_vocabulary(config: Mapping[str, Any], owner: Checkpoint, written: Mapping[str, TensorRef]) -> dict[str, Any]:
    """`config`, which is `owner`'s, with the `vocab_size` of the embedding that is written."""
    name = next((n for n, ref in owner.tensors.items() if ref is owner.embedding), None)
    new, own = written.get(name or ""), owner.embedding
    if new is None or own is None or new.shape[0] == own.shape[0]:
        return dict(config)
    changed: dict[str, Any] = _copied(config)
    for part in (changed, text_config(changed)):
        if "vocab_size" in part:
            part["vocab_size"] = new.shape[0]  # type: ignore[index]
    return changed


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
