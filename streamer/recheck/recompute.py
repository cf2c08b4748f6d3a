"""Recompute some modules of a finished output from its inputs, and compare them with its manifest.

The job is rebuilt from the manifest and planned as ever; its plan is cut down to the modules that are asked for, and
the ordinary pass writes them to a temporary folder. So a tampered output shows even where its manifest was made to fit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ByteSize

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import header_digest
from safeshard.manifests.schema import MANIFEST_NAME, Manifest, Tool
from safeshard.manifests.sizes import human
from safeshard.manifests.verify import Finding
from safeshard.streamer.calibration.data.data_files import BUILT_IN_NAME
from safeshard.streamer.methods import METHODS
from safeshard.streamer.methods.base import ROLES, Job, random_key
from safeshard.streamer.options import RunOptions, build
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.planner import Planner
from safeshard.streamer.plan.written.files import output_file
from safeshard.streamer.recheck.inputs import Note
from safeshard.streamer.run.ending.finish import tool_versions
from safeshard.streamer.run.flow.tasks import JobRun
from safeshard.streamer.run.one_pass import Pass
from safeshard.streamer.run.runner import largest_step
from safeshard.streamer.write.writer import Writer

PLACES = frozenset({*ROLES, "calibration", "factors", "task_data", "keep_data"})


def recompute(manifest: Manifest, places: Mapping[str, str], count: int, seed: int, note: Note) -> list[Finding]:
    """Compare `count` modules, chosen by `seed`, with the manifest; an empty list means that they are as it says.

    Of a module its tensors and its entry are compared, and of the whole output the headers of its files. Tensors that
    belong to no module are not. `places` says where the inputs lie; they must be those of the manifest.

    Raises:
        RequestError: the manifest describes no job of this version, or there is too little memory or disk.
        RunError: reading or computing failed.
    """
    with tempfile.TemporaryDirectory(prefix="safeshard-") as folder:
        plan = Planner().plan_inputs(_job(manifest, places, Path(folder) / "output"))
        findings = list(_planned_differences(plan, manifest))
        common = plan.modules.keys() & {module.name for module in manifest.modules}
        chosen = sorted(common, key=lambda name: (random_key(seed, name), name))[:count]
        note(f"recomputed {len(chosen)} of {len(plan.modules)} modules: {', '.join(sorted(chosen))}")
        if chosen:
            _reduce(plan, _closed(plan, chosen))
            findings += _computed_differences(plan, manifest, note)
    return findings


def _job(manifest: Manifest, places: Mapping[str, str], output: Path) -> Job:
    """The job that a manifest describes, with its inputs in `places`."""
    name, options = manifest.method.name, manifest.method.options
    if name not in METHODS:
        raise RequestError(Offence(MANIFEST_NAME, "method", f"one of {', '.join(METHODS)}", name))
    foreign = [*(manifest.inputs.keys() - PLACES), *(options.keys() & {*PLACES, "output"})]
    if foreign:  # an option that names a place, or the other way round, would go round the checks of places
        expected = "inputs under their roles, and options that name no place"
        raise RequestError([Offence(MANIFEST_NAME, key, expected, "another") for key in sorted(foreign)])
    given = {role: place for role, place in places.items() if (role, place) != ("calibration", BUILT_IN_NAME)}
    fields = METHODS[name].model_fields  # a default counts as not given: fewer samples than asked for are refused
    fixed = getattr(METHODS[name], "published", {}) if options.get("recipe") else {}  # where a default says something
    chosen = {k: v for k, v in options.items() if k not in fields or k in fixed or fields[k].default != v}
    return build(METHODS[name], {**chosen, **given, "output": output}, MANIFEST_NAME)


def _planned_differences(plan: JobPlan, manifest: Manifest) -> Iterator[Finding]:
    """What the inputs' headers alone show: other modules, other files."""
    theirs = {module.name for module in manifest.modules}
    for name in sorted(plan.modules.keys() ^ theirs):
        problem = "no module of these inputs" if name in theirs else "a module that the manifest does not name"
        yield Finding(MANIFEST_NAME, name, problem)
    headers = {file.name: file.header_sha256 for file in manifest.files if file.header_sha256 is not None}
    ours = {file.name: header_digest(file.header) for file in plan.files}
    for name in sorted(headers.keys() | ours.keys()):
        if headers.get(name) != ours.get(name):
            problem = "header differs from the one recomputed"
            yield Finding(name, "", problem, headers.get(name) or "no file", ours.get(name, "no file"))


def _closed(plan: JobPlan, chosen: Sequence[str]) -> list[str]:
    """The chosen modules, and those that write into the same tensors: fused experts."""
    touched = {name for module in chosen for name in plan.modules[module].outputs}
    return [name for name, module in plan.modules.items() if name in set(chosen) or module.outputs & touched]


def _reduce(plan: JobPlan, chosen: Sequence[str]) -> None:
    """Leave of a plan only some modules, and files that hold just their tensors."""
    plan.modules = {name: module for name, module in plan.modules.items() if name in set(chosen)}
    wanted = {tensor for module in plan.modules.values() for tensor in module.tensors(plan.job)}
    plan.copies = [copy for copy in plan.copies if copy.name in wanted]
    plan.files = [
        output_file(file.name, [(ref.name, ref.dtype, ref.shape) for ref in refs])
        for file in plan.files
        if (refs := [ref for name, ref in file.tensors.items() if name in wanted])
    ]


def _computed_differences(plan: JobPlan, manifest: Manifest, note: Note) -> list[Finding]:
    job_run = JobRun(plan)
    options = build(RunOptions, {"device": "cpu" if manifest.tool.device == "cpu" else "auto", "quiet": True})
    device = torch.device(options.resolved_device())
    options = options.model_copy(update={"memory": _memory(job_run, device, options.memory)})
    _check_disk(plan)
    job_run.writer = Writer(plan.job.output, plan.files, {}, overwrite=False)
    if plan.job.ranks_first:  # the choice depends on all cosines: the others' are taken from the manifest
        job_run.cosines = {m.name: m.cosine for m in manifest.modules if m.name not in plan.modules}
    if plan.job.target_leak is not None:  # it follows from all modules
        job_run.strength = next((s for m in manifest.modules for s in (m.penalty, m.strength) if s is not None), None)
    try:
        pass_ = Pass(options, device)
        pass_.execute([job_run])
        _note_tool(manifest.tool, tool_versions(pass_.measured().device), note)
        return list(_differences(job_run, manifest))
    finally:
        job_run.writer.abandon()


def _memory(job_run: JobRun, device: torch.device, default: int) -> ByteSize:
    """A budget that suffices; how large it is changes no byte."""
    need, name = largest_step([job_run], device)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        remedy = "use a larger machine"
        raise RequestError(Offence("--recompute", name, f"{human(need)} of memory", human(there), remedy))
    return ByteSize(max(need, default))


def _check_disk(plan: JobPlan) -> None:
    folder = Path(plan.job.output).parent
    if plan.bytes_to_write > (free := shutil.disk_usage(folder).free):
        remedy = "recompute fewer modules, or set TMPDIR"
        raise RequestError(Offence(str(folder), "", f"{human(plan.bytes_to_write)} of free space", human(free), remedy))


def _note_tool(theirs: Tool, ours: Tool, note: Note) -> None:
    for what in ("safeshard", "torch", "device"):
        recorded, here = getattr(theirs, what), getattr(ours, what)
        if recorded != here:
            note(f"{what}: {recorded} is recorded, {here} recomputed: the last bits may differ for that reason")


def _differences(job_run: JobRun, manifest: Manifest) -> Iterator[Finding]:
    """What was recomputed against the manifest: every field of the modules' entries, every tensor's hash."""
    assert job_run.writer is not None
    entries = {m.name: m.model_dump(mode="json", exclude_none=True) for m in manifest.modules}
    for name in job_run.plan.modules:
        theirs, ours = entries[name], job_run.entries[name]
        unknown = {"effect"} - theirs.keys()  # earlier versions did not measure it
        for key in sorted((theirs.keys() | ours.keys()) - unknown):
            if theirs.get(key) != ours.get(key):
                problem = f"{key} differs from the one recomputed"
                yield Finding(MANIFEST_NAME, name, problem, str(theirs.get(key)), str(ours.get(key)))
    hashes = {(tensor.file, tensor.name): tensor.blake3 for tensor in manifest.tensors}
    for file in job_run.plan.files:
        for name in file.tensors:
            recorded, recomputed = hashes.get((file.name, name), "no such tensor"), job_run.writer.hashes[name]
            if recorded != recomputed:
                yield Finding(file.name, name, "hash differs from the one recomputed", recorded, recomputed)
