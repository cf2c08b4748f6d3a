"""Tensors that hold a row for each token, in vocabularies of other sizes: with a pad token more, or padded."""

from __future__ import annotations

import re
from dataclasses import replace

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.tensor_names import layer_of

_VOCABULARY = re.compile(
    r"(.*\.)?[^.]*(embed|wte|wpe|lm_head|output_layer)[^.]*\.(weight|bias)|(.*\.)?final_logits_bias|output\.weight"
)


def only_rows_differ(name: str, one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors hold a row for each token, and differ in shape by no more than how many."""
    alike = len(one.shape) == len(other.shape) and one.shape[1:] == other.shape[1:]
    return alike and layer_of(name) is None and bool(_VOCABULARY.fullmatch(name))


def rows(ref: TensorRef, start: int, stop: int) -> TensorRef:
    """Some rows of a tensor, as a tensor of its own in the same file."""
    row = ref.nbytes // ref.shape[0] if ref.shape[0] else 0
    shape = (stop - start, *ref.shape[1:])
    return replace(ref, shape=shape, offset=ref.offset + start * row, nbytes=(stop - start) * row)


def common_rows(one: TensorRef, other: TensorRef) -> tuple[TensorRef, TensorRef]:
    """The rows that two tensors both have; tensors of one shape as they are."""
    if one.shape == other.shape:
        return one, other
    count = min(one.shape[0], other.shape[0])
    return rows(one, 0, count), rows(other, 0, count)


def added_rows(aligned: TensorRef, tuned: TensorRef) -> TensorRef | None:
    """The rows of the fine-tuned tensor that the aligned one lacks; None where there are none."""
    count = aligned.shape[0] if aligned.shape else 0
    return rows(tuned, count, tuned.shape[0]) if tuned.shape and tuned.shape[0] > count else None
