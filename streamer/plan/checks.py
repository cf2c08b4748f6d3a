"""What headers show to be wrong with a request: between its inputs, and about its outputs."""

from __future__ import annotations

from collections.abc import Iterator

from safeshard.manifests.errors import Offence
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import BUFFERS, FLOATS, Checkpoint
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.outputs import counterpart
from safeshard.streamer.plan.side_files import MAX_SIDE_BYTES, SIDE_FILES
from safeshard.streamer.plan.storage import module_offences, moved
from safeshard.streamer.tensor_names import natural


def input_offences(plan: JobPlan) -> Iterator[Offence]:
    """Offences that the headers of one job's inputs show against each other."""
    aligned, finetuned, safe = plan.aligned, plan.finetuned, plan.safe
    for role, other in plan.inputs.items():
        if role == "aligned":
            continue
        if isinstance(other, Checkpoint):
            if other.source.identity == aligned.source.identity:
                yield Offence(other.source.spec, "", "another checkpoint than --aligned", "the same", f"check --{role}")
            yield from _shape_offences(aligned, other)
            yield from module_offences(aligned, other)
    modules = list(finetuned.modules) if isinstance(finetuned, Adapter) else list(aligned.linears)
    for checkpoint in (c for c in plan.inputs.values() if isinstance(c, Checkpoint)):
        yield from checkpoint.treatable(
            modules if checkpoint is aligned or plan.job.gated or checkpoint is finetuned else ()
        )
        for module in modules if checkpoint not in (finetuned, safe) else ():  # theirs are compared whole, below
            weight = aligned.weight(module)
            if weight is not None and checkpoint.weight(module) is None:
                yield checkpoint.offence(
                    weight.name, "a weight of the aligned model", "missing", "use a matching checkpoint"
                )
    if isinstance(finetuned, Checkpoint):
        if not modules:
            yield Offence(aligned.source.spec, "", "decoder layers with 2-D weights", "none", "check the checkpoint")
        yield from aligned.untreatable_tensors()
        for checkpoint in (c for c in (finetuned, safe) if isinstance(c, Checkpoint)):
            yield from _name_offences(aligned, checkpoint)
        if plan.job.rest_role == "finetuned":
            yield from _dtype_offences(aligned, finetuned)
    if isinstance(finetuned, Adapter) and plan.job.writes_checkpoint:
        for module in finetuned.modules:
            weight = aligned.weight(module)
            if weight is not None and weight.name != f"{module}.weight" and module not in aligned.linears:
                got, remedy = f"it shares {weight.name}", "write an adapter, or untie the weights"
                yield Offence(finetuned.source.spec, module, "a weight of its own, to write it changed", got, remedy)
    yield from plan.job.check(finetuned, safe)
    if plan.job.writes_model:
        yield from _side_file_offences(plan)


def _side_file_offences(plan: JobPlan) -> Iterator[Offence]:
    """Offences of small files that are taken over, and held in memory for that."""
    for source in (plan.aligned.source, plan.finetuned.source):
        sizes = source.sizes()
        for name in SIDE_FILES:
            if sizes.get(name, 0) > MAX_SIDE_BYTES:
                where, expected = f"{source.spec}/{name}", f"at most {MAX_SIDE_BYTES} bytes"
                yield Offence(where, "", expected, f"{sizes[name]} bytes", "check the file")


def _shape_offences(aligned: Checkpoint, other: Checkpoint) -> Iterator[Offence]:
    elsewhere, _ = moved(aligned, other)
    for name, ref in aligned.tensors.items():
        theirs = counterpart(other, name)
        if theirs is None or theirs.shape == ref.shape or name in elsewhere:
            continue
        remedy = "use checkpoints of one architecture"
        if theirs.shape[1:] == ref.shape[1:] and ("embed" in name or "wte" in name or "lm_head" in name):
            remedy = (
                "the vocabularies differ (padded, or with added tokens): resize the embeddings to one vocabulary first"
            )
        yield other.offence(name, f"{list(ref.shape)}, as in {aligned.source.spec}", str(list(theirs.shape)), remedy)


def _dtype_offences(aligned: Checkpoint, tuned: Checkpoint) -> Iterator[Offence]:
    """Offences of tensors beside the linears whose numbers cannot take the aligned tensor's dtype."""
    floats = (*FLOATS, "F64")
    linears = {name for stored in aligned.linears.values() for name in stored.names} | aligned.encoded_tensors
    for name, ref in aligned.tensors.items():
        theirs = counterpart(tuned, name)
        if theirs is None or theirs.dtype == ref.dtype or name in linears or BUFFERS.fullmatch(name):
            continue
        if ref.dtype not in floats or theirs.dtype not in floats:
            expected, remedy = f"{ref.dtype}, as in {aligned.source.spec}", "convert one of the checkpoints first"
            yield tuned.offence(theirs.name, expected, theirs.dtype, remedy)


def _name_offences(aligned: Checkpoint, other: Checkpoint) -> Iterator[Offence]:
    remedy = "use checkpoints of one architecture"
    ours, theirs = moved(aligned, other)
    for name in sorted(aligned.tensors.keys() - other.tensors.keys() - ours, key=natural):
        if not BUFFERS.fullmatch(name) and not (other.tied and name == "lm_head.weight"):
            yield other.offence(name, f"every tensor of {aligned.source.spec}", "missing", remedy)
    for name in sorted(other.tensors.keys() - aligned.tensors.keys() - theirs, key=natural):
        tied = aligned.tied and other.config.get("tie_word_embeddings", True)
        if not BUFFERS.fullmatch(name) and not (tied and name == "lm_head.weight"):
            yield other.offence(name, f"no tensor that {aligned.source.spec} lacks", "an extra tensor", remedy)
