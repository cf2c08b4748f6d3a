"""What a job writes: the modules to compute, the tensors to take over, and the files they go to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from safeshard.manifests.safetensors_header import TensorRef, layout
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.adapter import WEIGHTS, Adapter
from safeshard.streamer.inputs.checkpoint import FLOATS, SINGLE, Checkpoint, is_head
from safeshard.streamer.inputs.expert_lora import full_shape, output, whole_ref
from safeshard.streamer.inputs.layouts import Stored, plain
from safeshard.streamer.inputs.names.unbuilt import BUFFERS, unbuilt
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.inputs.vocabulary import added_rows, common_rows, only_rows_differ
from safeshard.streamer.methods.base import Job, unit_scaling_config
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, OutputFile, Pair, Weight
from safeshard.streamer.plan.layout import Layout, layout_of
from safeshard.streamer.plan.written.model_config import is_other_class
from safeshard.streamer.plan.written.serving import serve_rank
from safeshard.streamer.plan.written.storage import encoded_counterparts, moved
from safeshard.streamer.plan.written.vocabulary import row_notes
from safeshard.streamer.plan.written.whole_tensors import describe, safe_notes
from safeshard.streamer.tensor_names import natural

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Named = tuple[str, str, tuple[int, ...]]  # of an output tensor: name, dtype, shape


def plan_outputs(plan: JobPlan) -> None:
    """Fill in a plan's modules, copies, files and fallbacks."""
    plan.fallbacks += _renamed(plan)
    plan.serve_rank = serve_rank(plan)
    adapter = plan.finetuned if isinstance(plan.finetuned, Adapter) else None
    if adapter is not None:
        _pair_modules(plan, adapter)
        plan.expected = adapter.expected
        plan.fallbacks += _adapter_fallbacks(plan, adapter, plan.safe if isinstance(plan.safe, Adapter) else None)
    else:
        _weight_modules(plan)
        plan.expected = len(plan.modules)
    if not plan.job.writes_model:
        return
    if plan.job.writes_checkpoint:
        _checkpoint_files(plan)
    else:
        assert adapter is not None
        _adapter_file(plan, adapter)


def _pair_modules(plan: JobPlan, adapter: Adapter) -> None:
    job, safe = plan.job, plan.safe
    pairs = safe.modules if isinstance(safe, Adapter) else {}
    for name, lora in adapter.modules.items():
        other = pairs.get(name)
        if job.writes_checkpoint:
            writes = {"weight": _written(plan, name)}
        else:
            ranks = plan.parts(lora, other)
            writes = {part: output(lora.a if part == "a" else lora.b, part, rank) for part, rank in ranks.items()}
        plan.modules[name] = ModulePlan(
            name,
            Pair(adapter.source, lora),
            Pair(safe.source, other) if other and isinstance(safe, Adapter) else None,
            _weight(plan.aligned, name) if job.takes_unaligned or job.writes_checkpoint else None,
            _weight(plan.inputs["unaligned"], name) if job.takes_unaligned else None,
            writes,
        )


def computed(plan: JobPlan) -> dict[str, Stored]:
    """The decoder's linears that a job on full checkpoints computes with; before its factors are known, all of them."""
    job, aligned = plan.job, plan.aligned
    treated = aligned.linears
    if plan.factors is not None:
        treated = {name: stored for name, stored in treated.items() if plan.linear(name) in plan.factors.modules}
    lacking = {*plan.excused["finetuned"], *(plan.excused["unaligned"] if job.takes_unaligned else ())}
    return {name: stored for name, stored in treated.items() if stored.names.isdisjoint(lacking)}


def _weight_modules(plan: JobPlan) -> None:
    job, aligned, tuned, safe = plan.job, plan.aligned, plan.finetuned, plan.safe
    assert isinstance(tuned, Checkpoint)
    treated = computed(plan)
    if job.edits_all and plan.factors is None:
        treated = {name: stored for name, stored in treated.items() if not _alike(stored, tuned.weight(name))}
        _tensor_modules(plan, tuned, {name for stored in treated.values() for name in stored.names})
    for name, stored in treated.items():
        plan.modules[name] = ModulePlan(
            name,
            _weight(tuned, name),
            _weight(safe, name, aligned) if isinstance(safe, Checkpoint) else None,
            Weight(aligned.source, stored),
            _weight(plan.inputs["unaligned"], name) if job.takes_unaligned else None,
            {"weight": _written(plan, name)},
        )
    if isinstance(safe, Checkpoint):
        written = {name for module in plan.modules.values() for name in module.outputs}
        plan.fallbacks += _grouped("a safe delta", "a zero delta", safe, plan.excused["safe"], written)
    if job.takes_unaligned:
        linears = {name for stored in aligned.linears.values() for name in stored.names}
        lacking = plan.excused["unaligned"]
        among = linears - plan.excused["finetuned"].keys()
        plan.fallbacks += _grouped(job.title, "carried over", plan.inputs["unaligned"], lacking, among)


def _written(plan: JobPlan, module: str) -> Stored:
    """Where in the output a module's weight goes."""
    stored = output_layout(plan).modules.find(module)
    assert stored is not None
    return stored


def output_layout(plan: JobPlan) -> Layout:
    """How the checkpoint that a job writes is laid out."""
    if plan.layout is None:
        job = plan.job
        plan.layout = layout_of(plan.aligned, job.dequantize, DTYPES[job.dtype or "bfloat16"])
    return plan.layout


def _alike(stored: Stored, other: Stored | None) -> bool:
    """Whether two weights lie in tensors of one name and form, so that both may be treated element by element."""
    places = [[(p.name, p.stored, p.view, p.start(), p.codec) for p in each.parts] for each in (stored, other) if each]
    return places[0] == places[-1] and not stored.encoded and other is not None


def _tensor_modules(plan: JobPlan, tuned: Checkpoint, taken: set[str]) -> None:
    """A module for every float tensor that the fine-tuned checkpoint has too, of any shape."""
    aligned = plan.aligned
    left = aligned.encoded_tensors | taken
    floats = {n: r for n, r in aligned.tensors.items() if r.dtype in FLOATS and n not in left}
    for tensor in sorted(floats, key=natural):
        theirs = counterpart(tuned, tensor)
        if theirs is not None and theirs.name not in tuned.encoded_tensors:
            name, ref = tensor.removesuffix(".weight"), floats[tensor]
            base, rows = common_rows(ref, theirs)
            places = Weight(tuned.source, plain(rows)), None, Weight(aligned.source, plain(base)), None
            added = None
            if base is not ref or rows is not theirs:
                added = added_rows(ref, theirs)
                plan.fallbacks += row_notes(plan.job.title, tensor, ref, theirs)
            more = Read(tuned.source, added) if added is not None else None
            plan.modules[name] = ModulePlan(name, *places, {"weight": plain(ref)}, more)
    plan.fallbacks += _untreated_floats(plan)


def _adapter_file(plan: JobPlan, adapter: Adapter) -> None:
    job = plan.job
    tensors: dict[str, Named] = {}
    ranks = {}
    for name, module in plan.modules.items():
        assert isinstance(module.finetuned, Pair)
        lora = module.finetuned.lora
        parts = plan.parts(lora, module.safe.lora if isinstance(module.safe, Pair) else None)
        rank = ranks[adapter.own_name(name)] = max(parts.values(), default=lora.rank)
        for part, ref in (("a", lora.a), ("b", lora.b)):
            if ref.name in tensors:  # one for all experts
                continue
            tensors[ref.name] = (ref.name, _dtype(job, ref.dtype), full_shape(ref, part, rank))
            if part not in parts:
                plan.copies.append(Copy(ref.name, adapter.source, whole_ref(ref)))
    carried = {copy.name: copy for copy in _whole_tensors(plan, adapter)}
    for name, copy in carried.items():
        shape = copy.ref.shape if copy.added is None else _stacked(copy.ref, copy.added.ref)
        tensors[name] = (name, _dtype(job, adapter.saved[name].dtype), shape)
        plan.copies.append(copy)
    plan.files = [output_file(WEIGHTS, tensors.values())]
    plan.adapter_config = job.adapter_config(adapter, ranks)
    if plan.serve_rank is not None:
        plan.adapter_config |= unit_scaling_config(adapter, ranks) | {"modules_to_save": None}
    if job.rest_role == "aligned":
        saved = [each for each in adapter.config.modules_to_save if any(each in name.split(".") for name in carried)]
        plan.adapter_config["modules_to_save"] = saved or None


def _whole_tensors(plan: JobPlan, adapter: Adapter) -> Iterator[Copy]:
    """What goes along of the tensors that an adapter carries whole.

    Where the rest is to be the aligned model's, that is what it has as well, and rows that it lacks.
    """
    whole = plan.whole.get("adapter", {})
    for key, ref in adapter.saved.items():
        difference, place = whole.get(key), adapter.places.get(key)
        done, copy = "carried over", Copy(key, adapter.source, ref)
        if plan.job.rest_role == "aligned":
            if difference is None or place is None or difference.added <= 0:
                plan.fallbacks.append(_left_out(key, f"--rest aligned; {describe(difference)}"))
                continue
            if not difference.equal and (added := added_rows(place, ref)) is not None:
                done = "the aligned one's rows, with those that are added"
                copy = Copy(key, plan.aligned.source, place, Read(adapter.source, added))
        yield copy
        why = f"it is a whole tensor, not a delta; {describe(difference)}"
        plan.fallbacks.append(Fallback(asked=plan.job.title, done=done, why=why, subject=key))


def _checkpoint_files(plan: JobPlan) -> None:
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
            shape = copy.ref.shape if copy.added is None else _stacked(copy.ref, copy.added.ref)
        else:
            continue
        file = SINGLE if alone else ref.file
        shards.setdefault(file, []).append((name, ref.dtype if encoded else _dtype(job, ref.dtype), shape))
    if isinstance(tuned, Checkpoint):
        plan.fallbacks += _grouped("the fine-tuned tensor", "the aligned one", tuned, plan.excused["finetuned"])
        for name, ref in _extras(plan, tuned):
            plan.copies.append(Copy(name, tuned.source, ref))
            shards[max(shards)].append((name, _dtype(job, ref.dtype), ref.shape))
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
        yield _left_out(key, f"--rest aligned; {describe(plan.whole.get('adapter', {}).get(key))}")


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
    if key is None or is_head(name) != key.endswith("lm_head.weight"):
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
    plan.fallbacks.append(_left_out(key, f"--rest aligned; {describe(whole[key])}"))
    return None if added is None else Copy(name, aligned.source, aligned.tensors[name], Read(adapter.source, added))


def _extras(plan: JobPlan, tuned: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """What the fine-tuned model has more: layers for prediction go along, and what need not be stored is left out."""
    reason = unbuilt(tuned.config)
    left: dict[str, str] = {}
    extra = tuned.tensors.keys() - plan.aligned.tensors.keys() - moved(plan.aligned, tuned)[1]
    for name in sorted(extra, key=natural):
        if BUFFERS.fullmatch(name) or is_head(name):
            plan.fallbacks.append(_left_out(name, "the aligned checkpoint lacks it; it is a buffer or a tied weight"))
        elif plan.job.rest_role == "finetuned":
            yield name, tuned.tensors[name]
        else:
            left[name] = reason(name)
    plan.fallbacks += _grouped("the fine-tuned tensor", "left out", plan.aligned, left)


def _written_shape(name: str, ref: TensorRef, module: ModulePlan) -> tuple[int, ...]:
    """The shape of what a module writes in place of `ref`: rows that both models have, then those that are added."""
    tuned = module.finetuned
    if module.added is not None:
        return _stacked(ref, module.added.ref)
    if isinstance(tuned, Weight) and tuned.stored.is_tensor and only_rows_differ(name, ref, tuned.stored.ref):
        return tuned.stored.ref.shape
    return ref.shape


def _stacked(first: TensorRef, more: TensorRef) -> tuple[int, ...]:
    return (first.shape[0] + more.shape[0], *first.shape[1:])


def _grouped(
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


def _untreated_floats(plan: JobPlan) -> Iterator[Fallback]:
    for name, ref in sorted(plan.aligned.tensors.items(), key=lambda item: natural(item[0])):
        if ref.dtype.startswith("F") and ref.dtype not in FLOATS and name not in plan.aligned.encoded_tensors:
            yield Fallback(asked=plan.job.title, done="carried over", why=f"its dtype is {ref.dtype}", subject=name)


def _renamed(plan: JobPlan) -> Iterator[Fallback]:
    for opened in plan.inputs.values():
        if read := str(opened.names):
            asked, why = "module names of the checkpoint", f"{opened.source.spec} names them so"
            yield Fallback(asked=asked, done=read, why=why)


def _left_out(name: str, why: str) -> Fallback:
    return Fallback(asked="the fine-tuned tensor", done="left out", why=why, subject=name)


def _adapter_fallbacks(plan: JobPlan, adapter: Adapter, safe: Adapter | None) -> Iterator[Fallback]:
    if safe is None:
        return
    yield from safe_notes(safe, plan.whole.get("safe_adapter", {}))
    for name in sorted(adapter.modules.keys() - safe.modules.keys(), key=natural):
        yield Fallback(
            asked="a safe delta", done="a zero delta", why="the safe adapter has no such module", subject=name
        )
    for name in sorted(safe.modules.keys() - adapter.modules.keys(), key=natural):
        why = "the fine-tuned adapter has no such module"
        yield Fallback(asked="a fine-tuned delta", done="a zero delta: the module stays aligned", why=why, subject=name)


def _weight(checkpoint: Checkpoint | Adapter, module: str, instead: Checkpoint | None = None) -> Weight:
    """A module's weight; `instead`'s where the checkpoint lacks it."""
    assert isinstance(checkpoint, Checkpoint)
    stored = checkpoint.weight(module)
    if stored is None and instead is not None:
        return _weight(instead, module)
    assert stored is not None
    return Weight(checkpoint.source, stored)


def counterpart(checkpoint: Checkpoint, name: str) -> TensorRef | None:
    """The tensor that stands for the aligned model's `name`: of a tied output head, the embedding.

    None where there is none that can be taken over as it is.
    """
    if name in checkpoint.reordered:
        return None
    if is_head(name) and name not in checkpoint.tensors:
        head = checkpoint.weight(name.removesuffix(".weight"))
        return head.ref if head is not None and head.is_tensor else None
    return checkpoint.tensors.get(name)


def _dtype(job: Job, dtype: str) -> str:
    return DTYPES[job.dtype] if job.dtype and dtype in FLOATS else dtype


def output_file(name: str, tensors: Iterable[Named]) -> OutputFile:
    """A safetensors file laid out for tensors of the given names, dtypes and shapes."""
    header, refs = layout(name, list(tensors), {"format": "pt"})
    return OutputFile(name, header, refs)
