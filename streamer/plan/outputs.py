"""What a job writes: the modules to compute, the tensors to take over, and the files they go to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from safeshard.manifests.safetensors_header import TensorRef, layout
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.adapter import WEIGHTS, Adapter
from safeshard.streamer.inputs.checkpoint import FLOATS, SINGLE, Checkpoint
from safeshard.streamer.inputs.expert_lora import full_shape, output, whole_ref
from safeshard.streamer.inputs.layouts import Stored, plain
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, OutputFile, Pair, Weight
from safeshard.streamer.plan.storage import encoded_counterparts, moved
from safeshard.streamer.tensor_names import natural

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Named = tuple[str, str, tuple[int, ...]]  # of an output tensor: name, dtype, shape


def plan_outputs(plan: JobPlan) -> None:
    """Fill in a plan's modules, copies, files and fallbacks."""
    adapter = plan.finetuned if isinstance(plan.finetuned, Adapter) else None
    if adapter is not None:
        _pair_modules(plan, adapter)
        plan.expected = adapter.expected
        plan.fallbacks += _adapter_fallbacks(adapter, plan.safe if isinstance(plan.safe, Adapter) else None)
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
            writes = {"weight": _weight(plan.aligned, name).stored}
        else:
            ranks = job.parts(lora, other)
            writes = {part: output(lora.a if part == "a" else lora.b, part, rank) for part, rank in ranks.items()}
        plan.modules[name] = ModulePlan(
            name,
            Pair(adapter.source, lora),
            Pair(safe.source, other) if other and isinstance(safe, Adapter) else None,
            _weight(plan.aligned, name) if job.gated or job.writes_checkpoint else None,
            _weight(plan.inputs["unaligned"], name) if job.gated else None,
            writes,
        )


def _weight_modules(plan: JobPlan) -> None:
    job, aligned, tuned, safe = plan.job, plan.aligned, plan.finetuned, plan.safe
    assert isinstance(tuned, Checkpoint)
    treated = aligned.linears
    if plan.factors is not None:
        treated = {name: stored for name, stored in treated.items() if name in plan.factors.modules}
    elif job.edits_all:
        treated = {name: stored for name, stored in treated.items() if not _alike(stored, tuned.weight(name))}
        _tensor_modules(plan, tuned, {name for stored in treated.values() for name in stored.names})
    for name, stored in treated.items():
        plan.modules[name] = ModulePlan(
            name,
            _weight(tuned, name),
            _weight(safe, name) if isinstance(safe, Checkpoint) else None,
            Weight(aligned.source, stored),
            _weight(plan.inputs["unaligned"], name) if job.gated else None,
            {"weight": stored},
        )


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
            name, stored = tensor.removesuffix(".weight"), plain(floats[tensor])
            places = Weight(tuned.source, plain(theirs)), None, Weight(aligned.source, stored), None
            plan.modules[name] = ModulePlan(name, *places, {"weight": stored})
    plan.fallbacks += _untreated_floats(plan)


def _adapter_file(plan: JobPlan, adapter: Adapter) -> None:
    job = plan.job
    tensors: dict[str, Named] = {}
    ranks = {}
    for name, module in plan.modules.items():
        assert isinstance(module.finetuned, Pair)
        lora = module.finetuned.lora
        parts = job.parts(lora, module.safe.lora if isinstance(module.safe, Pair) else None)
        rank = ranks[adapter.own_name(name)] = max(parts.values(), default=lora.rank)
        for part, ref in (("a", lora.a), ("b", lora.b)):
            if ref.name in tensors:  # one for all experts
                continue
            tensors[ref.name] = (ref.name, _dtype(job, ref.dtype), full_shape(ref, part, rank))
            if part not in parts:
                plan.copies.append(Copy(ref.name, adapter.source, whole_ref(ref)))
    for ref in adapter.saved.values():
        if job.rest_role == "finetuned":
            tensors[ref.name] = (ref.name, _dtype(job, ref.dtype), ref.shape)
            plan.copies.append(Copy(ref.name, adapter.source, ref))
            if job.edits_all:
                why = "it is a whole tensor, not a delta"
                plan.fallbacks.append(Fallback(asked=job.title, done="carried over", why=why, subject=ref.name))
        else:
            plan.fallbacks.append(_left_out(ref.name, "--rest aligned"))
    plan.files = [output_file(WEIGHTS, tensors.values())]
    plan.adapter_config = job.adapter_config(adapter, ranks)


def _checkpoint_files(plan: JobPlan) -> None:
    """Shards laid out as the aligned checkpoint's; what no module writes is taken over from where `rest_role` says."""
    job, aligned, tuned = plan.job, plan.aligned, plan.finetuned
    rest = tuned if isinstance(tuned, Checkpoint) and job.rest_role == "finetuned" else aligned
    written = {name for module in plan.modules.values() for name in module.outputs}
    same = encoded_counterparts(aligned, rest)
    shards: dict[str, list[Named]] = {}
    for name, ref in aligned.tensors.items():
        file = ref.file if len(aligned.files) > 1 else SINGLE
        encoded = name in aligned.encoded_tensors
        shards.setdefault(file, []).append((name, ref.dtype if encoded else _dtype(job, ref.dtype), ref.shape))
        if name in written:
            continue
        theirs = same.get(name) if encoded else counterpart(rest, name)
        plan.copies.append(Copy(name, rest.source, theirs) if theirs else Copy(name, aligned.source, ref))
        if theirs is None:
            why = f"{rest.source.spec} {'stores it in another format' if encoded else 'lacks it; it is a buffer'}"
            plan.fallbacks.append(
                Fallback(asked="the fine-tuned tensor", done="the aligned one", why=why, subject=name)
            )
    if isinstance(tuned, Adapter):
        plan.fallbacks += [_left_out(key, "--rest aligned") for key in sorted(tuned.saved)]
    else:
        extra = sorted(tuned.tensors.keys() - aligned.tensors.keys() - moved(aligned, tuned)[1])
        why = "the aligned checkpoint lacks it; it is a buffer or a tied weight"
        plan.fallbacks += [_left_out(name, why) for name in extra]
    plan.files = [output_file(file, tensors) for file, tensors in sorted(shards.items())]


def _untreated_floats(plan: JobPlan) -> Iterator[Fallback]:
    for name, ref in sorted(plan.aligned.tensors.items(), key=lambda item: natural(item[0])):
        if ref.dtype.startswith("F") and ref.dtype not in FLOATS and name not in plan.aligned.encoded_tensors:
            yield Fallback(asked=plan.job.title, done="carried over", why=f"its dtype is {ref.dtype}", subject=name)


def _left_out(name: str, why: str) -> Fallback:
    return Fallback(asked="the fine-tuned tensor", done="left out", why=why, subject=name)


def _adapter_fallbacks(adapter: Adapter, safe: Adapter | None) -> Iterator[Fallback]:
    for each in filter(None, (adapter, safe)):
        if each.renamed:
            yield Fallback(
                asked="module names of the checkpoint", done=each.renamed, why=f"{each.source.spec} names them so"
            )
    if safe is None:
        return
    for name in sorted(adapter.modules.keys() - safe.modules.keys(), key=natural):
        yield Fallback(
            asked="a safe delta", done="a zero delta", why="the safe adapter has no such module", subject=name
        )
    for name in sorted(safe.modules.keys() - adapter.modules.keys(), key=natural):
        why = "the fine-tuned adapter has no such module"
        yield Fallback(asked="a fine-tuned delta", done="a zero delta: the module stays aligned", why=why, subject=name)


def _weight(checkpoint: Checkpoint | Adapter, module: str) -> Weight:
    assert isinstance(checkpoint, Checkpoint)
    stored = checkpoint.weight(module)
    assert stored is not None
    return Weight(checkpoint.source, stored)


def counterpart(checkpoint: Checkpoint, name: str) -> TensorRef | None:
    """The tensor that stands for the aligned model's `name`: of a tied output head, the embedding."""
    if name == "lm_head.weight" and name not in checkpoint.tensors:
        head = checkpoint.weight("lm_head")
        return head.ref if head is not None and head.is_tensor else None
    return checkpoint.tensors.get(name)


def _dtype(job: Job, dtype: str) -> str:
    return DTYPES[job.dtype] if job.dtype and dtype in FLOATS else dtype


def output_file(name: str, tensors: Iterable[Named]) -> OutputFile:
    """A safetensors file laid out for tensors of the given names, dtypes and shapes."""
    header, refs = layout(name, list(tensors), {"format": "pt"})
    return OutputFile(name, header, refs)
