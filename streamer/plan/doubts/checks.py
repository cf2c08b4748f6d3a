"""What headers show to be wrong with a request: between its inputs, and about its outputs."""

from __future__ import annotations

from collections.abc import Iterator

from safeshard.manifests.errors import Offence
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import FLOATS, NOT_GATHERED, Checkpoint, is_head
from safeshard.streamer.inputs.compare import row_difference
from safeshard.streamer.inputs.expert_lora import is_expert, is_gate_up
from safeshard.streamer.inputs.lora_config import MERGE
from safeshard.streamer.inputs.matching import of_head
from safeshard.streamer.inputs.names.parts import part_of
from safeshard.streamer.inputs.names.unbuilt import BUFFERS, unbuilt
from safeshard.streamer.inputs.vocabulary import only_rows_differ
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.written.files import counterpart
from safeshard.streamer.plan.written.outputs import computed
from safeshard.streamer.plan.written.side_files import MAX_SIDE_BYTES, SIDE_FILES, is_licence
from safeshard.streamer.plan.written.storage import module_offences, moved
from safeshard.streamer.plan.written.whole_tensors import Whole, describe, safe_offences
from safeshard.streamer.tensor_names import natural

_UNTRAINED = (".base_layer.", ".original_module.")  # PEFT's copies of what was there before, where it saves all


def input_offences(plan: JobPlan) -> Iterator[Offence]:
    """Offences that the headers of one job's inputs show against each other."""
    aligned, finetuned, safe = plan.aligned, plan.finetuned, plan.safe
    checkpoints = {role: each for role, each in plan.inputs.items() if isinstance(each, Checkpoint)}
    for role, other in checkpoints.items():
        if role != "aligned" and other.source.identity == aligned.source.identity:
            yield Offence(other.source.spec, "", "another checkpoint than --aligned", "the same", f"check --{role}")
    if empty := [
        offence for each in checkpoints.values() for offence in _gathered_offences(each, list(checkpoints.values()))
    ]:
        yield from empty
        return
    modules = list(finetuned.modules) if isinstance(finetuned, Adapter) else list(computed(plan))
    for role, checkpoint in checkpoints.items():
        yield from checkpoint.treatable(
            modules if checkpoint is aligned or plan.job.takes_unaligned or checkpoint is finetuned else ()
        )
        if checkpoint is not aligned:
            yield from module_offences(aligned, checkpoint, modules, plan.excused[role], role == "unaligned")
    if isinstance(finetuned, Checkpoint):
        if not aligned.linears:
            yield Offence(aligned.source.spec, "", "decoder layers with 2-D weights", "none", "check the checkpoint")
        yield from aligned.untreatable_tensors()
        yield from _missing_offences(plan, "finetuned", finetuned)
        yield from _extra_offences(aligned, finetuned)
        if isinstance(safe, Checkpoint):
            yield from _missing_offences(plan, "safe", safe)
        if plan.job.rest_role == "finetuned":
            yield from _shape_offences(plan, finetuned)
            yield from _dtype_offences(aligned, finetuned)
    if isinstance(finetuned, Adapter) and plan.job.writes_checkpoint:
        for module in finetuned.modules:
            weight = aligned.weight(module)
            if weight is not None and aligned.tied and is_head(f"{module}.weight"):
                got, remedy = (
                    f"it shares {weight.name}",
                    "use a method that writes an adapter, or untie the weights first",
                )
                yield Offence(finetuned.source.spec, module, "a weight of its own, to write it changed", got, remedy)
    if isinstance(safe, Adapter):
        yield from safe_offences(safe, plan.whole.get("safe_adapter", {}))
        if isinstance(finetuned, Adapter):
            yield from _packing_offences(aligned, finetuned, safe)
    if isinstance(finetuned, Adapter) and plan.job.writes_checkpoint and plan.job.rest_role == "finetuned":
        yield from _no_place_offences(aligned, finetuned, plan.whole.get("adapter", {}))
    yield from plan.job.check(finetuned, safe)
    if plan.job.writes_model:
        yield from _side_file_offences(plan)


def _packing_offences(aligned: Checkpoint, tuned: Adapter, safe: Adapter) -> Iterator[Offence]:
    """An offence where one adapter has a pair for an expert's gate and up together, and the other one for each."""
    linear = aligned.modules.linear
    theirs = {linear(name): name for name in tuned.modules if is_expert(name)}
    for name in safe.modules:
        if is_expert(name) and (other := theirs.get(linear(name))) and is_gate_up(name) != is_gate_up(other):
            expected, apart = (
                f"pairs of experts as {tuned.source.spec} has them: {other}",
                safe if is_gate_up(other) else tuned,
            )
            remedy = f"load {apart.source.spec} with a current PEFT and transformers 5, and save it again"
            yield Offence(safe.source.spec, name, expected, "others", remedy)
            return


def _no_place_offences(aligned: Checkpoint, adapter: Adapter, whole: Whole) -> Iterator[Offence]:
    """Offences of tensors that an adapter carries whole, for a checkpoint that has none of them."""
    for key in sorted(adapter.saved):
        difference, place = whole.get(key), adapter.places.get(key)
        if (difference is not None and difference.equal) or any(copy in key for copy in _UNTRAINED):
            continue
        if place is None or difference is None or is_head(place.name) != of_head(key):
            got, remedy = describe(difference), f"use a method that writes an adapter; or {MERGE}"
            yield Offence(adapter.source.spec, key, f"a tensor of {aligned.source.spec} to take its place", got, remedy)


def _side_file_offences(plan: JobPlan) -> Iterator[Offence]:
    """Offences of small files that an output cannot do without, and that are held in memory to take them over."""
    for source in (plan.aligned.source, plan.finetuned.source):
        sizes = source.sizes()
        for name, size in sorted(sizes.items()):
            if size > MAX_SIDE_BYTES and (name in SIDE_FILES or is_licence(name)):
                where, expected = f"{source.spec}/{name}", f"at most {MAX_SIDE_BYTES} bytes"
                yield Offence(where, "", expected, f"{size} bytes", "check the file")


def _gathered_offences(checkpoint: Checkpoint, all_of_them: list[Checkpoint]) -> Iterator[Offence]:
    """Offences of weights that were saved where only a share of them, or none, was on the process that saved.

    What has no elements in any checkpoint of the job is none of them.
    """

    def elsewhere(name: str) -> list[TensorRef]:
        return [ref for other in all_of_them if other is not checkpoint and (ref := other.tensors.get(name))]

    empty = [
        name
        for name, ref in checkpoint.tensors.items()
        if ref.shape == (0,)
        and name.endswith(".weight")
        and (any(other.nbytes for other in elsewhere(name)) or not elsewhere(name))
    ]
    if empty:
        first = min(empty, key=natural)
        got = f"shape [0], as {len(empty)} tensors have" if len(empty) > 1 else "shape [0]"
        yield checkpoint.offence(first, "a weight with elements", got, NOT_GATHERED)


def _shape_offences(plan: JobPlan, tuned: Checkpoint) -> Iterator[Offence]:
    """Offences of tensors beside the linears: a vocabulary may have other rows, nothing else."""
    aligned = plan.aligned
    passed = moved(aligned, tuned)[0] | {name for stored in aligned.linears.values() for name in stored.names}
    for name, ref in aligned.tensors.items():
        theirs = counterpart(tuned, name)
        if name in passed or theirs is None or theirs.shape == ref.shape or BUFFERS.fullmatch(name):
            continue
        if not only_rows_differ(name, ref, theirs):
            expected, remedy = f"{list(ref.shape)}, as in {aligned.source.spec}", "use checkpoints of one architecture"
            yield tuned.offence(name, expected, str(list(theirs.shape)), remedy)


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


def _missing_offences(plan: JobPlan, role: str, other: Checkpoint) -> Iterator[Offence]:
    aligned, excused = plan.aligned, plan.excused[role]
    elsewhere = moved(aligned, other)[0]
    for name in sorted(aligned.tensors.keys() - other.tensors.keys() - excused.keys() - elsewhere, key=natural):
        if counterpart(other, name) is None:
            remedy = "save or fetch it again, whole; a model of another architecture does not fit"
            if is_head(name) and other.embedding is not None:
                remedy = (
                    "save or fetch it again, whole; where it shares the embedding's weight, config.json has to say so "
                    "(tie_word_embeddings)"
                )
            yield other.offence(name, f"every tensor of {aligned.source.spec}", "missing", remedy)


def _extra_offences(aligned: Checkpoint, tuned: Checkpoint) -> Iterator[Offence]:
    """Offences of what the fine-tuned model has more and the aligned one's layout has no place for."""
    reason = unbuilt(tuned.config)
    elsewhere = moved(aligned, tuned)[1]
    for name in sorted(tuned.tensors.keys() - aligned.tensors.keys() - elsewhere, key=natural):
        if reason(name) or (is_head(name) and aligned.tied and tuned.says_tied and _copies_embedding(tuned, name)):
            continue
        remedy = "use the model that the fine-tuning started from as --aligned"
        if is_head(name) and aligned.tied:
            remedy = (
                "its output head was trained apart from the embedding: untie the aligned model's first, by a copy of "
                f"its embedding as {name} and tie_word_embeddings false in its config.json"
            )
        elif part := part_of(name):
            remedy = f"use the release with this part ({part}) as --aligned"
        yield tuned.offence(name, f"no tensor that {aligned.source.spec} lacks", "an extra tensor", remedy)


def _copies_embedding(tuned: Checkpoint, head: str) -> bool:
    """Whether a stored head holds what config.json says that it shares; else it is what transformers 5 loads."""
    embedding, ref = tuned.embedding, tuned.tensors[head]
    if embedding is None or ref.dtype not in FLOATS or embedding.dtype not in FLOATS:
        return True
    return ref.shape == embedding.shape and row_difference((tuned.source, embedding), (tuned.source, ref)).equal
