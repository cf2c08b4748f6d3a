"""config.json of a written checkpoint: whose it is, and what of it must follow what is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.checkpoint import Checkpoint, is_head
from safeshard.streamer.inputs.names.unbuilt import text_config
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.layout import quantised_as
from safeshard.streamer.plan.written.vocabulary import with_vocabulary

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def config_owner(plan: JobPlan) -> Checkpoint:
    """The checkpoint whose config.json a written checkpoint takes: the fine-tuned one's own, if it fits the layout.

    The tensors lie as the aligned model's do, so that a save of another model class (the language model alone) says
    nothing about them.
    """
    aligned, tuned = plan.aligned, plan.finetuned
    if not isinstance(tuned, Checkpoint) or not tuned.config or is_other_class(aligned, tuned):
        return aligned
    return tuned


def is_other_class(aligned: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether two checkpoints were saved from models of different classes."""
    kinds = [checkpoint.config.get("model_type") for checkpoint in (aligned, tuned)]
    return None not in kinds and kinds[0] != kinds[1]


def model_config(plan: JobPlan) -> dict[str, Any]:
    """config.json of the output; {} where neither model has one."""
    owner = config_owner(plan)
    written: dict[str, TensorRef] = {name: ref for file in plan.files for name, ref in file.tensors.items()}
    said = quantised_as(owner.config, plan.aligned, plan.job.dequantize)
    config = with_vocabulary(said, owner, written)
    if not config:
        return {}
    if any(map(is_head, written)):  # or the head that is written would be passed over on loading
        config = _untied(config)
    dtypes = {ref.dtype for ref in written.values() if ref.dtype in TORCH_NAMES}
    if len(dtypes) == 1:
        config |= dict.fromkeys({"dtype", "torch_dtype"} & config.keys(), TORCH_NAMES[dtypes.pop()])
    return config


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what ties the head to the embedding, of the language model inside too."""
    inner = text_config(config)
    untied = dict(config)
    if untied.get("tie_word_embeddings"):
        untied["tie_word_embeddings"] = False
    if inner is not config and inner.get("tie_word_embeddings"):
        untied |= {key: _untied(value) for key, value in config.items() if isinstance(value, dict) and value is inner}
    return untied
