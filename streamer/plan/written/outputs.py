"""What a job writes: the modules to compute, the tensors to take over, and the files they go to."""

from __future__ import annotations

from collections.abc import Iterator

from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.adapter import WEIGHTS, Adapter
from safeshard.streamer.inputs.checkpoint import FLOATS, Checkpoint, is_embedding
from safeshard.streamer.inputs.expert_lora import full_shape, output, whole_ref
from safeshard.streamer.inputs.layouts import Stored, plain
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.inputs.vocabulary import added_rows, common_rows
from safeshard.streamer.methods.shared.served import unit_scaling_config
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, Pair, Weight
from safeshard.streamer.plan.written.checkpoint_files import checkpoint_files, grouped
from safeshard.streamer.plan.written.files import (
    Named,
    counterpart,
    dtype_of,
    left_out,
    output_file,
    output_layout,
    stacked,
)
from safeshard.streamer.plan.written.serving import serve_rank
from safeshard.streamer.plan.written.vocabulary import row_notes
from safeshard.streamer.plan.written.whole_tensors import describe, safe_notes
from safeshard.streamer.tensor_names import natural


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
        checkpoint_files(plan)
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
        plan.fallbacks += grouped("a safe delta", "a zero delta", safe, plan.excused["safe"], written)
    if job.takes_unaligned:
        linears = {name for stored in aligned.linears.values() for name in stored.names}
        lacking = plan.excused["unaligned"]
        among = linears - plan.excused["finetuned"].keys()
        plan.fallbacks += grouped(job.title, "carried over", plan.inputs["unaligned"], lacking, among)


def _written(plan: JobPlan, module: str) -> Stored:
    """Where in the output a module's weight goes: of an embedding, a linear of tokens, that is in x out."""
    stored = output_layout(plan).modules.find(module)
    assert stored is not None
    return plain(stored.ref, transposed=True) if is_embedding(module) and stored.is_tensor else stored


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
            tensors[ref.name] = (ref.name, dtype_of(job, ref.dtype), full_shape(ref, part, rank))
            if part not in parts:
                plan.copies.append(Copy(ref.name, adapter.source, whole_ref(ref)))
    carried = {copy.name: copy for copy in _whole_tensors(plan, adapter)}
    for name, copy in carried.items():
        shape = copy.ref.shape if copy.added is None else stacked(copy.ref, copy.added.ref)
        tensors[name] = (name, dtype_of(job, adapter.saved[name].dtype), shape)
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
                plan.fallbacks.append(left_out(key, f"--rest aligned; {describe(difference)}"))
                continue
            if not difference.equal and (added := added_rows(place, ref)) is not None:
                done = "the aligned one's rows, with those that are added"
                copy = Copy(key, plan.aligned.source, place, Read(adapter.source, added))
        yield copy
        why = f"it is a whole tensor, not a delta; {describe(difference)}"
        plan.fallbacks.append(Fallback(asked=plan.job.title, done=done, why=why, subject=key))


def _untreated_floats(plan: JobPlan) -> Iterator[Fallback]:
    for name, ref in sorted(plan.aligned.tensors.items(), key=lambda item: natural(item[0])):
        if ref.dtype.startswith("F") and ref.dtype not in FLOATS and name not in plan.aligned.encoded_tensors:
            yield Fallback(asked=plan.job.title, done="carried over", why=f"its dtype is {ref.dtype}", subject=name)


def _renamed(plan: JobPlan) -> Iterator[Fallback]:
    for opened in plan.inputs.values():
        if read := str(opened.names):
            asked, why = "module names of the checkpoint", f"{opened.source.spec} names them so"
            yield Fallback(asked=asked, done=read, why=why)


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
