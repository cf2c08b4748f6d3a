"""What makes two requests one and the same: to resume, and to pass by what is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

from safeshard.manifests.errors import RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import (
    MANIFEST_NAME,
    Input,
    InputFile,
    Manifest,
    load,
)  # fmt: skip
from safeshard.streamer.inputs import lora_config
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.written.afar import There
from safeshard.streamer.sources import LocalSource, Source
from safeshard.streamer.sources.base import Checked

version = cache(metadata.version)  # it reads a package's whole description each time
Checks = Mapping[str, Mapping[str, Checked]]  # by role and file


def fingerprint(plan: JobPlan, device: str) -> dict[str, Any]:
    """All that the output's bytes depend on, to notice on resume that something changed."""
    inputs = {role: given.model_dump(mode="json") for role, given in inputs_of(plan).items()}
    for role, opened in plan.inputs.items():
        if _may_change(opened.source):
            times = {f.name: opened.source.local_path(f.name).stat().st_mtime_ns for f in opened.files}
            inputs[role]["modified"] = times
    found = {
        "safeshard": version("safeshard"),
        "torch": version("torch"),
        "device": device,  # devices round differently in the last bits
        "method": plan.job.method,
        "options": plan.job.settings(),
        "inputs": inputs,
        "side_files": {file.name: file.blake3 or file.size for file in plan.side_files},
        "files": [*(file.name for file in plan.files), *(file.name for file in plan.side_files)],
    }
    if plan.part is not None:  # the cut depends on all jobs of the batch
        cut = hash_bytes(b"".join([json.dumps(sorted(plan.modules)).encode(), *(file.header for file in plan.files)]))
        found["part"] = {"part": str(plan.part), "cut": cut, "modules": plan.shared}
    return found


def finished(plan: JobPlan, there: There | None = None) -> Manifest | None:
    """The manifest of an output that this very plan wrote before; None where it is not there whole, or another's.

    `there` is what lies at the place of an output afar.
    """
    job = plan.job
    if isinstance(job.output, str):
        manifest = there.manifest if there is not None and there.is_whole else None
    else:
        manifest = _whole(job.output)
    if manifest is None:
        return None
    local = [(opened.source, opened.files) for opened in plan.inputs.values() if _may_change(opened.source)]
    modified = [source.local_path(f.name).stat().st_mtime for source, files in local for f in files]
    if max(modified, default=0.0) > manifest.run.start.timestamp():  # headers do not show that weights were retrained
        return None
    inputs = {role: _unchecked(given) for role, given in manifest.inputs.items()}
    entries = {file.name: file for file in manifest.files}
    for side in plan.side_files:
        entry = entries.get(side.name)
        if entry is None or entry.size != side.size or (side.blake3 and entry.blake3 != side.blake3):
            return None
    theirs = (manifest.tool.safeshard, manifest.method.name, manifest.method.options, inputs)
    return manifest if theirs == (version("safeshard"), job.method, job.settings(), inputs_of(plan)) else None


def _whole(output: Path) -> Manifest | None:
    """The manifest of a folder that holds all that it names, by size."""
    try:
        manifest = load(output / MANIFEST_NAME)
        whole = all((output / file.name).stat().st_size == file.size for file in manifest.files)
    except (RequestError, OSError):
        return None
    return manifest if whole else None


def _may_change(source: Source) -> TypeGuard[LocalSource]:
    """Whether other weights may come with the same header: not at a commit of the Hub, wherever its copy lies."""
    return isinstance(source, LocalSource) and source.revision is None


def _unchecked(given: Input) -> Input:
    return given.model_copy(update={"files": tuple(f.model_copy(update={"checked": None}) for f in given.files)})


def checked_inputs(plan: JobPlan, parts: Sequence[Checks] = ()) -> dict[str, Input]:
    """The inputs once they have been read: with how each file was held against what its place states of it.

    `parts` are the checks of those who read them, where that was not this process.
    """
    inputs = inputs_of(plan)
    for role, found in merged_checks(parts or [checks_of(plan)]).items():
        files = (f.model_copy(update={"checked": found.get(f.name)}) for f in inputs[role].files)
        inputs[role] = inputs[role].model_copy(update={"files": tuple(files)})
    return inputs


def checks_of(plan: JobPlan) -> dict[str, dict[str, Checked]]:
    """By role and file, how what was read was held against what its place states, where that states something."""
    inputs = inputs_of(plan)
    return {
        role: {f.name: how for f in inputs[role].files if (how := opened.source.checked(f.name)) is not None}
        for role, opened in plan.inputs.items()
    }


def merged_checks(parts: Sequence[Checks]) -> dict[str, dict[str, Checked]]:
    """The checks of several processes as one: a file was hashed whole if it was wherever it was read."""
    found: dict[str, dict[str, Checked]] = {}
    for role, files in (item for part in parts for item in part.items()):
        for name, how in files.items():
            own = found.setdefault(role, {})
            own[name] = how if own.get(name, how) == how else "ranges"
    return found


def inputs_of(plan: JobPlan) -> dict[str, Input]:
    """The inputs as headers tell."""
    inputs = {}
    for role, opened in plan.inputs.items():
        files = [file.entry for file in opened.files]
        config = lora_config.CONFIG if isinstance(opened, Adapter) else "config.json"
        sizes = opened.source.sizes()
        if config in sizes:
            data = opened.source.read(config, 0, sizes[config])
            files.append(InputFile(name=config, size=len(data), blake3=hash_bytes(data)))
        inputs[role] = Input(source=opened.source.spec, revision=opened.source.revision, files=tuple(files))
    return inputs | (plan.factors.inputs() if plan.factors else {})
