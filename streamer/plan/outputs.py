"""What a job writes: the modules to compute, the tensors to take over, and the files they go to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from safeshard.manifests.safetensors_header import TensorRef, layout
from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.adapter import WEIGHTS, Adapter
from safeshard.streamer.inputs.checkpoint import FLOATS, SINGLE, Checkpoint
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, OutputFile, Pair, Weight
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
            writes = {"weight": _weight(plan.aligned, name).ref.name}
        else:
            writes = {part: (lora.a if part == "a" else lora.b).name for part in job.parts(lora, other)}
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
        treated = {name: ref for name, ref in treated.items() if name in plan.factors.modules}
    elif job.edits_all:
        floats = {n: r for n, r in aligned.tensors.items() if r.dtype in FLOATS and counterpart(tuned, n)}
        treated = {n.removesuffix(".weight"): floats[n] for n in sorted(floats, key=natural)}
        plan.fallbacks += _untreated_floats(plan)
    for name, ref in treated.items():
        plan.modules[name] = ModulePlan(
            name,
            _tensor(tuned, ref.name),
            _tensor(safe, ref.name) if isinstance(safe, Checkpoint) else None,
            _tensor(aligned, ref.name),
            _tensor(plan.inputs["unaligned"], ref.name) if job.gated else None,
            {"weight": ref.name},
        )


def _adapter_file(plan: JobPlan, adapter: Adapter) -> None:
    job = plan.job
    tensors: list[Named] = []
    ranks = {}
    for name, module in plan.modules.items():
        assert isinstance(module.finetuned, Pair)
        lora = module.finetuned.lora
        parts = job.parts(lora, module.safe.lora if isinstance(module.safe, Pair) else None)
        rank = ranks[adapter.own_name(name)] = max(parts.values(), default=lora.rank)
        for part, ref, shape in (("a", lora.a, (rank, lora.a.shape[1])), ("b", lora.b, (lora.b.shape[0], rank))):
            tensors.append((ref.name, _dtype(job, ref.dtype), shape))
            if part not in parts:
                plan.copies.append(Copy(ref.name, adapter.source, ref))
    for ref in adapter.saved.values():
        if job.rest_role == "finetuned":
            tensors.append((ref.name, _dtype(job, ref.dtype), ref.shape))
            plan.copies.append(Copy(ref.name, adapter.source, ref))
            if job.edits_all:
                why = "it is a whole tensor, not a delta"
                plan.fallbacks.append(Fallback(asked=job.title, done="carried over", why=why, subject=ref.name))
        else:
            plan.fallbacks.append(_left_out(ref.name, "--rest aligned"))
    plan.files = [output_file(WEIGHTS, tensors)]
    plan.adapter_config = job.adapter_config(adapter, ranks)


def _checkpoint_files(plan: JobPlan) -> None:
    """Shards laid out as the aligned checkpoint's; what no module writes is taken over from where `rest_role` says."""
    job, aligned, tuned = plan.job, plan.aligned, plan.finetuned
    rest = tuned if isinstance(tuned, Checkpoint) and job.rest_role == "finetuned" else aligned
    written = {name for module in plan.modules.values() for name in module.writes.values()}
    shards: dict[str, list[Named]] = {}
    for name, ref in aligned.tensors.items():
        file = ref.file if len(aligned.files) > 1 else SINGLE
        shards.setdefault(file, []).append((name, _dtype(job, ref.dtype), ref.shape))
        if name in written:
            continue
        theirs = counterpart(rest, name)
        plan.copies.append(Copy(name, rest.source, theirs) if theirs else Copy(name, aligned.source, ref))
        if theirs is None:
            why = f"{rest.source.spec} lacks it; it is a buffer"
            plan.fallbacks.append(
                Fallback(asked="the fine-tuned tensor", done="the aligned one", why=why, subject=name)
            )
    if isinstance(tuned, Adapter):
        plan.fallbacks += [_left_out(key, "--rest aligned") for key in sorted(tuned.saved)]
    else:
        extra = sorted(tuned.tensors.keys() - aligned.tensors.keys())
        why = "the aligned checkpoint lacks it; it is a buffer or a tied weight"
        plan.fallbacks += [_left_out(name, why) for name in extra]
    plan.files = [output_file(file, tensors) for file, tensors in sorted(shards.items())]


def _untreated_floats(plan: JobPlan) -> Iterator[Fallback]:
    for name, ref in sorted(plan.aligned.tensors.items(), key=lambda item: natural(item[0])):
        if ref.dtype.startswith("F") and ref.dtype not in FLOATS:
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
    ref = checkpoint.weight(module)
    assert ref is not None
    return Weight(checkpoint.source, ref, checkpoint.is_transposed(module))


def _tensor(checkpoint: Checkpoint | Adapter, name: str) -> Weight:
    assert isinstance(checkpoint, Checkpoint)
    ref = counterpart(checkpoint, name)
    assert ref is not None
    return Weight(checkpoint.source, ref, checkpoint.is_transposed(name.removesuffix(".weight")))


def counterpart(checkpoint: Checkpoint, name: str) -> TensorRef | None:
    """The tensor that stands for the aligned model's `name`: of a tied output head, the embedding."""
    return checkpoint.weight("lm_head") if name == "lm_head.weight" else checkpoint.tensors.get(name)


def _dtype(job: Job, dtype: str) -> str:
    return DTYPES[job.dtype] if job.dtype and dtype in FLOATS else dtype


def output_file(name: str, tensors: Iterable[Named]) -> OutputFile:
    """A safetensors file laid out for tensors of the given names, dtypes and shapes."""
    header, refs = layout(name, list(tensors), {"format": "pt"})
    return OutputFile(name, header, refs)
