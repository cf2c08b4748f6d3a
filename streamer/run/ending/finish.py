"""The end of a job: side files, model card and manifest, then the output gets its name."""

from __future__ import annotations

import itertools
import json
import re
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from safeshard.manifests.card import card
from safeshard.manifests.errors import without_secrets
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.safetensors_header import header_digest
from safeshard.manifests.schema import (
    MANIFEST_NAME,
    Fallback,
    FileEntry,
    Manifest,
    Method,
    ModuleEntry,
    Run,
    TensorEntry,
    Tool,
)  # fmt: skip
from safeshard.streamer.clock import Clock
from safeshard.streamer.inputs import lora_config
from safeshard.streamer.inputs.lies_there import INDEX
from safeshard.streamer.plan.doubts.bases import known_id
from safeshard.streamer.plan.identity import checked_inputs, version
from safeshard.streamer.plan.job_plan import JobPlan, ModulePlan, Pair
from safeshard.streamer.plan.written.model_config import model_config
from safeshard.streamer.run.ending.cautions import cautions
from safeshard.streamer.run.ending.licence import licence
from safeshard.streamer.run.flow.effects import total
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.tensor_names import natural
from safeshard.streamer.write.part_record import PartRecord
from safeshard.streamer.write.writer import Writer


def rounded(clock: Clock) -> dict[str, float]:
    """Seconds by stage, as the manifest has them."""
    return {stage: round(seconds, 3) for stage, seconds in sorted(clock.seconds.items())}


@dataclass(frozen=True)
class Measured:
    """Figures of a run. Seconds are summed over threads; peaks are in bytes."""

    device: str
    start: datetime
    wall_s: float
    bytes_read: int
    peak_buffer_bytes: int
    peak_device_bytes: int
    seconds: dict[str, float]


def peak_host_bytes() -> int:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists() and (kibibytes := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(kibibytes[1]) * 1024
    # Under Linux this would be the parent's too, as it was when it started this process: a notebook's gigabytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes


def tool_versions(device: str) -> Tool:
    """Versions for the manifest."""
    return Tool(safeshard=version("safeshard"), torch=version("torch"), triton=_version("triton"), device=device)


def publish(job_run: JobRun, measured: Measured, overwrite: bool, parts: Sequence[PartRecord] = ()) -> Manifest:
    """Complete an output whose tensors are all written: name its shards, add the small files, publish it.

    `parts` are the records of those who wrote the tensors, where that was not this process.
    """
    plan, writer = job_run.plan, job_run.writer
    assert writer is not None
    writer.complete()
    whole = plan.job.writes_checkpoint
    small = _checkpoint_files(plan) if whole else _adapter_files(plan)
    manifest = _manifest(job_run, measured, parts)
    small["README.md"] = card(
        manifest, known_id(plan.aligned.source), "checkpoint" if whole else "adapter", licence(plan)
    ).encode()
    files = [FileEntry(name=f.name, size=f.nbytes, header_sha256=header_digest(f.header)) for f in plan.files]
    taken = ((file.name, file.read()) for file in plan.side_files)  # one at a time
    for name, data in itertools.chain(small.items(), taken):
        writer.add_file(name, data)
        files.append(FileEntry(name=name, size=len(data), blake3=hash_bytes(data)))
    written = writer.bytes_written + sum(part.run.bytes_written for part in parts)
    run = manifest.run.model_copy(update={"bytes_written": written})
    manifest = manifest.model_copy(update={"files": tuple(sorted(files, key=lambda f: f.name)), "run": run}).sealed()
    writer.add_file(MANIFEST_NAME, manifest.to_json().encode())
    writer.publish(overwrite)
    return manifest


def run_of(measured: Measured, writer: Writer) -> Run:
    """The figures of a run and of one of its outputs, as the manifest has them."""
    return Run(
        start=measured.start, wall_s=measured.wall_s, bytes_read=measured.bytes_read,
        bytes_written=writer.bytes_written,
        peak_host_bytes=peak_host_bytes(), peak_device_bytes=measured.peak_device_bytes,
        peak_buffer_bytes=measured.peak_buffer_bytes, seconds=measured.seconds | rounded(writer.clock),
    )  # fmt: skip


def _with_parts(run: Run, parts: Sequence[PartRecord]) -> Run:
    """The figures of all parts and of what put them together: sums, peaks, and the time of the slowest."""
    if not parts:
        return run
    runs = [part.run for part in parts]
    seconds = Counter(run.seconds)
    for each in runs:
        seconds.update(each.seconds)
    return Run(
        start=min(each.start for each in [run, *runs]),
        wall_s=run.wall_s + max(each.wall_s for each in runs),
        bytes_read=run.bytes_read + sum(each.bytes_read for each in runs),
        bytes_written=run.bytes_written,
        peak_host_bytes=max(each.peak_host_bytes for each in [run, *runs]),
        peak_device_bytes=max(each.peak_device_bytes for each in [run, *runs]),
        peak_buffer_bytes=max(each.peak_buffer_bytes or 0 for each in [run, *runs]),
        seconds={stage: round(value, 3) for stage, value in sorted(seconds.items())},
    )


def _manifest(job_run: JobRun, measured: Measured, parts: Sequence[PartRecord]) -> Manifest:
    plan, job, writer = job_run.plan, job_run.job, job_run.writer
    assert writer is not None
    copied = {
        copy.name for copy in plan.copies if writer.place(copy.name).dtype == copy.ref.dtype and copy.added is None
    }
    touched = {name for module in plan.modules.values() if not _untouched(job_run, module) for name in module.outputs}
    copied |= {name for module in plan.modules.values() for name in module.outputs} - touched
    roles = {opened.source.identity: role for role, opened in plan.inputs.items()}
    origins = {copy.name: roles[copy.source.identity] for copy in plan.copies}
    tensors = [
        TensorEntry(
            name=name, file=file.name, dtype=ref.dtype, shape=ref.shape, blake3=writer.hashes[name],
            action="copied" if name in copied else "edited", source=origins.get(name),
        )
        for file in plan.files
        for name, ref in file.tensors.items()
    ]  # fmt: skip
    settings = job.settings()
    return Manifest(
        tool=parts[0].tool if parts else tool_versions(measured.device),
        method=Method(name=job.method, paper=job.paper, options=settings, seed=settings.get("seed")),
        inputs=checked_inputs(plan, [part.checked for part in parts]),
        modules=tuple(ModuleEntry(**job_run.entries[name]) for name in plan.modules),
        tensors=tuple(sorted(tensors, key=lambda t: natural(t.name))),
        files=tuple(FileEntry(name=f.name, size=f.nbytes, header_sha256=header_digest(f.header)) for f in plan.files),
        fallbacks=(*plan.fallbacks, *job_run.fallbacks, *_reverted(job_run)),
        effect=total(job_run.entries[name] for name in plan.modules),
        warnings=tuple(cautions(job_run)) or None,
        run=_with_parts(run_of(measured, writer), parts),
    )


def _reverted(job_run: JobRun) -> Iterator[Fallback]:
    """Modules that were to be treated and were kept aligned instead."""
    for entry in job_run.entries.values():
        if entry["decision"] == "reverted":
            yield Fallback(
                asked=job_run.job.title, done="kept aligned", why=entry.get("note", ""), subject=entry["name"]
            )


def _untouched(job_run: JobRun, module: ModulePlan) -> bool:
    """Whether a module's tensors hold the input's bytes: it was kept, in its dtype and at its scaling."""
    writer, finetuned = job_run.writer, module.finetuned
    assert writer is not None
    pair = isinstance(finetuned, Pair)
    if pair and job_run.job.writes_checkpoint:
        return False
    if isinstance(finetuned, Pair):
        same_dtype = all(writer.place(ref.name).dtype == ref.dtype for ref in (finetuned.lora.a, finetuned.lora.b))
    else:
        same = {ref.name: ref.dtype for ref in finetuned.stored.refs()}
        same_dtype = all(same.get(name) == writer.place(name).dtype for name in module.outputs)
    same_dtype = same_dtype and module.added is None
    return (
        job_run.entries[module.name]["decision"] == "kept"
        and same_dtype
        and not (pair and job_run.job.writes_unit_scaling)
    )


def _adapter_files(plan: JobPlan) -> dict[str, bytes]:
    config = plan.adapter_config or {}
    if isinstance(base := config.get("base_model_name_or_path"), str):
        config = config | {"base_model_name_or_path": without_secrets(base)}
    return {lora_config.CONFIG: _json(config)}


def _checkpoint_files(plan: JobPlan) -> dict[str, bytes]:
    """The configuration, the fine-tuned model's own where it fits; and the index of several files."""
    files: dict[str, bytes] = {}
    if config := model_config(plan):
        files["config.json"] = _json(config)
    if len(plan.files) > 1:
        weight_map = {name: file.name for file in plan.files for name in file.tensors}
        total = sum(ref.nbytes for file in plan.files for ref in file.tensors.values())
        files[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
