"""What options and headers show that is allowed, and that few can mean: warned about, or refused with --strict."""

from __future__ import annotations

from collections.abc import Iterator

from safeshard.manifests.schema import Caution
from safeshard.streamer.inputs.checkpoint import Checkpoint
from safeshard.streamer.plan.doubts.bases import base_cautions
from safeshard.streamer.plan.job_plan import JobPlan


def cautions(plan: JobPlan) -> Iterator[Caution]:
    """Warnings about one job before it runs."""
    yield from _values(plan)
    yield from base_cautions(plan)
    yield from _families(plan)


def _families(plan: JobPlan) -> Iterator[Caution]:
    """Checkpoints whose configs name another type of model than the aligned one's, though their tensors fit."""
    ours = _types(plan.aligned)
    for role, other in plan.inputs.items():
        if isinstance(other, Checkpoint) and ours and (theirs := _types(other)) and not ours & theirs:
            text = f"--{role} is a {min(theirs)} by its config.json, --aligned a {min(ours)}"
            yield Caution(kind="mix-up", text=text, remedy="check that they are of one family")


def _types(checkpoint: Checkpoint) -> set[str]:
    """What config.json calls the model and, of a multimodal one, the language model in it."""
    inner = checkpoint.config.get("text_config")
    configs = [checkpoint.config, inner if isinstance(inner, dict) else {}]
    return {kind.removesuffix("_text") for each in configs if isinstance(kind := each.get("model_type"), str)}


def _values(plan: JobPlan) -> Iterator[Caution]:
    """Values outside of the range in which they mean something, and those that say what will come out."""
    job = plan.job
    threshold, factor = getattr(job, "threshold", None), getattr(job, "factor", None)
    if threshold is not None and abs(threshold) > 1:
        every = "every" if threshold > 1 else "no"
        yield Caution(
            kind="value", text=f"--threshold {threshold:g} lies outside of [-1, 1]: it changes {every} module"
        )
    if factor is not None:
        if not 0 <= factor <= 1:
            text = f"--factor {factor:g} lies outside of [0, 1]: the delta is made larger, or turned round"
            yield Caution(kind="value", text=text)
        if factor == 1:
            yield Caution(kind="unchanged", text="--factor 1 gives the fine-tuned model", remedy="choose a lower one")
        elif abs(factor) < 0.1:
            text = f"--factor {factor:g} removes nearly all of the fine-tuned delta"
            yield Caution(kind="removed", text=text, remedy=f"{job.keeps_more} keeps more")
    if (number := getattr(job, "num_layers", None)) is not None and number > len(plan.modules):
        text = f"--num-layers {number} is more than the {len(plan.modules)} modules that there are: all are changed"
        yield Caution(kind="value", text=text)
    if any(not 0 <= weight <= 1 for weight in getattr(job, "weights", ())):
        text = f"--weights {' '.join(f'{w:g}' for w in getattr(job, 'weights', ()))}: one lies outside of [0, 1]"
        yield Caution(kind="value", text=text)
