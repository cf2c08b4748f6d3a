"""What a tensor's name says: the stack of layers it stands in, and which part of a model that belongs to."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|$)")
# Beginnings of the words by which models name what is not the language model, and what that is.
_PARTS = {
    "vision": (
        "vision", "visual", "image", "img", "video", "vit", "siglip", "clip", "pixtral", "vpm", "vqmodel", "vq_",
        "sam_", "eva", "patch_embed", "embed_vision",
    ),
    "audio": ("audio", "speech", "sound", "whisper", "apm", "embed_audio", "asr"),
    "generation": ("talker", "token2wav", "code2wav", "code_predictor"),
    "prediction": ("mtp", "nextn"),
    "connector": (
        "multi_modal", "multimodal", "mm_", "connector", "merger", "patch_merg", "perceive", "aligner", "resampler",
        "abstractor", "modality_projection",
    ),
}  # fmt: skip


def stack_of(name: str) -> tuple[str, str] | None:
    """A name cut before its first number: `model.layers` and `.3.mlp.up_proj`. None outside of layers."""
    match = _NUMBER.search(name)
    return (name[: match.start()], name[match.start() :]) if match else None


def part_of(name: str) -> str:
    """The part of a model that a name belongs to, "" for the language model; what comes first in the name decides."""
    for word in name.split("."):
        for part, beginnings in _PARTS.items():
            if word.startswith(beginnings) or (part == "connector" and "projector" in word):
                return part
    return ""
