"""What headers show to be wrong with a request: between its inputs, and about its outputs."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import MANIFEST_NAME, load
from safeshard.streamer.adapter import Adapter
from safeshard.streamer.checkpoint import BUFFERS, FLOATS, Checkpoint, natural
from safeshard.streamer.finish import MAX_SIDE_BYTES, SIDE_FILES
from safeshard.streamer.hidden_states import COPIES
from safeshard.streamer.methods.base import Job
from safeshard.streamer.outputs import counterpart
from safeshard.streamer.plan import JobPlan, staging_of
from safeshard.streamer.staging import is_half_copied


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
            if weight is not None and weight.name != f"{module}.weight":
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
    for name, ref in aligned.tensors.items():
        theirs = counterpart(other, name)
        if theirs is None or theirs.shape == ref.shape:
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
    linears = {ref.name for ref in aligned.linears.values()}
    for name, ref in aligned.tensors.items():
        theirs = counterpart(tuned, name)
        if theirs is None or theirs.dtype == ref.dtype or name in linears or BUFFERS.fullmatch(name):
            continue
        if ref.dtype not in floats or theirs.dtype not in floats:
            expected, remedy = f"{ref.dtype}, as in {aligned.source.spec}", "convert one of the checkpoints first"
            yield tuned.offence(theirs.name, expected, theirs.dtype, remedy)


def _name_offences(aligned: Checkpoint, other: Checkpoint) -> Iterator[Offence]:
    remedy = "use checkpoints of one architecture"
    for name in sorted(aligned.tensors.keys() - other.tensors.keys(), key=natural):
        if not BUFFERS.fullmatch(name) and not (other.tied and name == "lm_head.weight"):
            yield other.offence(name, f"every tensor of {aligned.source.spec}", "missing", remedy)
    for name in sorted(other.tensors.keys() - aligned.tensors.keys(), key=natural):
        tied = aligned.tied and other.config.get("tie_word_embeddings", True)
        if not BUFFERS.fullmatch(name) and not (tied and name == "lm_head.weight"):
            yield other.offence(name, f"no tensor that {aligned.source.spec} lacks", "an extra tensor", remedy)


def output_offences(jobs: Sequence[Job], plans: Sequence[JobPlan], overwrite: bool) -> Iterator[Offence]:
    """Offences about where jobs write: what is there already, each other's way, and too small a disk."""
    need: dict[int, tuple[Path, int]] = {}  # by file system
    sizes = {id(plan.job): 0 if plan.finished else plan.bytes_to_write for plan in plans}
    for plan in {id(p.factors): p for p in reversed(plans) if p.factors and not p.finished}.values():
        assert plan.factors is not None
        sizes[id(plan.job)] += COPIES * plan.factors.hidden_bytes  # which lie beside the first of the jobs that share
    done = {id(plan.job) for plan in plans if plan.finished}
    paths = {id(job): _place(job.output) for job in jobs if job.writes_model}
    taken = Counter(paths.values()) + Counter(staging_of(path) for path in paths.values() if path.name)
    for job in (job for job in jobs if job.writes_model):
        path, shown = paths[id(job)], str(job.output)
        if taken[path] > 1 or any(parent in taken for parent in path.parents):
            yield Offence("--output", shown, "a folder of its own for each job", "another job's", "rename one")
        if unusable := list(place_offences(job.output, job.inputs().values())):
            yield from unusable
            continue
        if id(job) in done:
            continue
        if is_half_copied(staging_of(path), path):
            pass  # the run that goes on from the folder beside it puts it right
        elif os.path.lexists(path) and not overwrite:
            remedy = "choose another, or --overwrite"
            yield Offence("--output", shown, "a folder that does not exist", "it exists", remedy)
        elif os.path.lexists(path) and not _replaceable(path):
            got = "something that safeshard did not write"
            yield Offence("--output", shown, "an output of safeshard, to overwrite", got, "remove it yourself")
        parent = next(p for p in path.parents if p.exists())
        first, before = need.get(parent.stat().st_dev, (parent, 0))
        need[parent.stat().st_dev] = (first, before + sizes.get(id(job), 0) - taken_bytes(staging_of(path)))
    for parent, nbytes in need.values():
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            yield Offence(
                "--output", str(parent), f"{nbytes} bytes of free space", f"{free}", "free some, or choose another disk"
            )


def taken_bytes(staging: Path) -> int:
    """Bytes of the disk that an unfinished output has already."""
    return sum(p.stat().st_blocks * 512 for p in staging.iterdir()) if staging.is_dir() else 0


def _replaceable(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    try:
        return not any(path.iterdir()) or bool(load(path / MANIFEST_NAME))
    except RequestError:
        return False


def place_offences(output: Path, inputs: Iterable[str]) -> Iterator[Offence]:
    """Offences of a place to write a folder, whatever is there: across an input, or where nothing can be written."""
    path, shown = _place(output), str(output)
    if path.name in ("", ".."):
        yield Offence("--output", shown, "a folder with a name", "none", "choose another")
        return
    folders = [Path(os.path.realpath(place)) for place in inputs if Path(place).is_dir()]
    target = Path(os.path.realpath(path))
    if any(target == folder or target in folder.parents or folder in target.parents for folder in folders):
        yield Offence("--output", shown, "a folder apart from the inputs", "one in their way", "choose another")
        return
    try:
        staging_of(path).exists()
        parent = next(p for p in path.parents if p.exists())
        got = "" if os.access(parent, os.W_OK | os.X_OK) else f"no right to write to {parent}"
        if not parent.is_dir():
            got = f"{parent} is a file"
    except OSError as error:  # too long, not permitted
        got = error.strerror or "none"
    if got:
        yield Offence("--output", shown, "a folder to write", got, "choose another")


def _place(output: Path) -> Path:
    """Where an output goes, links and `..` on the way there followed. A link in its own place is not."""
    path = output.absolute()
    return Path(os.path.realpath(path.parent)) / path.name
