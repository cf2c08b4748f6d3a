"""The files of a checkpoint that a job writes: which tensors are computed, which are taken over, and from whom."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from safeshard.manifests.safetensors_header import TensorRef
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.inputs.checkpoint import Checkpoint, is_head
from safeshard.streamer.inputs.lies_there import SINGLE
from safeshard.streamer.inputs.matching import of_head
from safeshard.streamer.inputs.names.unbuilt import BUFFERS, unbuilt
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.inputs.vocabulary import added_rows, only_rows_differ
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, Weight
from safeshard.streamer.plan.written.files import (
    Named,
    counterpart,
    dtype_of,
    left_out,
    output_file,
    output_layout,
    stacked,
)
from safeshard.streamer.plan.written.model_config import is_other_class
from safeshard.streamer.plan.written.storage import encoded_counterparts, moved
from safeshard.streamer.plan.written.vocabulary import row_notes
from safeshard.streamer.plan.written.whole_tensors import describe
from safeshard.streamer.tensor_names import natural


def checkpoint_files(plan: JobPlan) -> None:
    """Shards laid out as the aligned checkpoint's; what no module writes is taken over from where `rest_role` says."""
    job, aligned, tuned = plan.job, plan.aligned, plan.finetuned
    rest = tuned if isinstance(tuned, Checkpoint) and job.rest_role == "finetuned" else aligned
    written = {name: module for module in plan.modules.values() for name in module.outputs}
    same = encoded_counterparts(aligned, rest)
    shards: dict[str, list[Named]] = {}
    laid_out = output_layout(plan).tensors
    alone = len({ref.file for ref in laid_out.values()}) < 2
    for name, ref in laid_out.items():
        encoded = name in aligned.encoded_tensors
        if (module := written.get(name)) is not None:
            shape = _written_shape(name, ref, module)
        elif name in aligned.tensors:  # else it was to be dequantised, and is refused
            copy = _taken_over(plan, name, same.get(name) if encoded else counterpart(rest, name), rest)
            plan.copies.append(copy)
            shape = copy.ref.shape if copy.added is None else stacked(copy.ref, copy.added.ref)
        else:
            continue
        file = SINGLE if alone else ref.file
        shards.setdefault(file, []).append((name, ref.dtype if encoded else dtype_of(job, ref.dtype), shape))
    if isinstance(tuned, Checkpoint):
        plan.fallbacks += grouped("the fine-tuned tensor", "the aligned one", tuned, plan.excused["finetuned"])
        for name, ref in _extras(plan, tuned):
            plan.copies.append(Copy(name, tuned.source, ref))
            shards[max(shards)].append((name, dtype_of(job, ref.dtype), ref.shape))
        if tuned.config and is_other_class(aligned, tuned):
            theirs = f"{tuned.config.get('model_type')}, of another layout"
            asked, done = "the fine-tuned model's config.json", "the aligned one's"
            plan.fallbacks.append(Fallback(asked=asked, done=done, why=f"its model_type is {theirs}"))
    else:
        plan.fallbacks += _saved_left_out(plan, tuned)
    plan.files = [output_file(file, tensors) for file, tensors in sorted(shards.items())]


def _saved_left_out(plan: JobPlan, adapter: Adapter) -> Iterator[Fallback]:
    """What a written checkpoint does not take of the tensors that an adapter carries whole, and was not said yet."""
    reads = [Read(copy.source, copy.ref) for copy in plan.copies] + [
        c.added for c in plan.copies if c.added is not None
    ]
    taken = {read.ref.name for read in reads if read.source is adapter.source}
    taken |= {fallback.subject for fallback in plan.fallbacks if fallback.subject is not None}
    for key in sorted(adapter.saved.keys() - taken):
        yield left_out(key, f"--rest aligned; {describe(plan.whole.get('adapter', {}).get(key))}")


def _taken_over(plan: JobPlan, name: str, ref: TensorRef | None, rest: Checkpoint) -> Copy:
    """An output tensor that no module writes: `rest`'s, with the rows that the fine-tuned model's vocabulary adds."""
    aligned, tuned = plan.aligned, plan.finetuned
    if isinstance(tuned, Adapter) and (copy := _from_adapter(plan, tuned, name)) is not None:
        return copy
    if ref is None:
        if name not in plan.excused.get("finetuned", ()) and name not in aligned.beside_encoded:
            why = f"{rest.source.spec} stores it in another format"
            plan.fallbacks.append(
                Fallback(asked="the fine-tuned tensor", done="the aligned one", why=why, subject=name)
            )
        return Copy(name, aligned.source, aligned.tensors[name])
    theirs = counterpart(tuned, name) if rest is aligned and isinstance(tuned, Checkpoint) else None
    if theirs is None or not only_rows_differ(name, ref, theirs) or (added := added_rows(ref, theirs)) is None:
        return Copy(name, rest.source, ref)
    plan.fallbacks += row_notes("--rest aligned", name, ref, theirs)
    return Copy(name, rest.source, ref, Read(tuned.source, added))


def _from_adapter(plan: JobPlan, adapter: Adapter, name: str) -> Copy | None:
    """A tensor of a checkpoint that the adapter carries whole; with `--rest aligned`, what it adds to it."""
    aligned, whole = plan.aligned, plan.whole.get("adapter", {})
    key = next((key for key, place in adapter.places.items() if place.name == name and key in whole), None)
    if key is None or is_head(name) != of_head(key):
        return None
    copy = Copy(name, adapter.source, adapter.saved[key])
    if plan.job.rest_role == "finetuned" or whole[key].equal:
        if plan.job.rest_role != "finetuned" and whole[key].added <= 0:
            return None
        if not whole[key].equal or whole[key].added:
            tied = "; the output head shares it, and changes with it" if aligned.tied and not is_head(name) else ""
            why = f"it is a whole tensor, not a delta; {describe(whole[key])}{tied if not whole[key].equal else ''}"
            plan.fallbacks.append(Fallback(asked=plan.job.title, done="the adapter's own", why=why, subject=name))
        return copy
    added = added_rows(aligned.tensors[name], adapter.saved[key])
    plan.fallbacks.append(left_out(key, f"--rest aligned; {describe(whole[key])}"))
    return None if added is None else Copy(name, aligned.source, aligned.tensors[name], Read(adapter.source, added))


def _extras(plan: JobPlan, tuned: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """What the fine-tuned model has more: layers for prediction go along, and what need not be stored is left out."""
    reason = unbuilt(tuned.config)
    left: dict[str, str] = {}
    extra = tuned.tensors.keys() - plan.aligned.tensors.keys() - moved(plan.aligned, tuned)[1]
    for name in sorted(extra, key=natural):
        if BUFFERS.fullmatch(name) or is_head(name):
            plan.fallbacks.append(left_out(name, "the aligned checkpoint lacks it; it is a buffer or a tied weight"))
        elif plan.job.rest_role == "finetuned":
            yield name, tuned.tensors[name]
        else:
            left[name] = reason(name)
    plan.fallbacks += grouped("the fine-tuned tensor", "left out", plan.aligned, left)


def _written_shape(name: str, ref: TensorRef, module: ModulePlan) -> tuple[int, ...]:
    """The shape of what a module writes in place of `ref`: rows that both models have, then those that are added."""
    tuned = module.finetuned
    if module.added is not None:
        return stacked(ref, module.added.ref)
    if isinstance(tuned, Weight) and tuned.stored.is_tensor and only_rows_differ(name, ref, tuned.stored.ref):
        return tuned.stored.ref.shape
    return ref.shape


def grouped(
    asked: str, done: str, lacks: Checkpoint | Adapter, names: Mapping[str, str], among: Collection[str] | None = None
) -> Iterator[Fallback]:
    """A fallback for each reason of what an input lacks: a release may store thousands of such tensors."""
    groups: dict[str, list[str]] = {}
    for name, why in names.items():
        if among is None or name in among:
            groups.setdefault(why, []).append(name)
    for why, group in groups.items():
        first, *more = sorted(group, key=natural)
        subject = f"{first} and {len(more)} more" if more else first
        yield Fallback(asked=asked, done=done, why=f"{lacks.source.spec} lacks it; {why}", subject=subject)
