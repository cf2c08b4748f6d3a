"""`calibrate`: run the aligned model over the calibration data once and save Grams and factors, for later jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safeshard.kernels.calibrated.half import packed_size
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import JOURNAL_NAME, Input
from safeshard.streamer.calibration.data.data_files import DATA
from safeshard.streamer.calibration.factor_files import (
    INDEX,
    SCHEMA,
    WITH_EXPERTS,
    FactorIndex,
    SavedFactors,
    sample_weights,
)
from safeshard.streamer.calibration.factors import Calibration, forward_dtype
from safeshard.streamer.calibration.hidden_states import COPIES, clear_states
from safeshard.streamer.device import exact_products
from safeshard.streamer.disk import clear_errors, write_file
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.options import RunOptions
from safeshard.streamer.plan.ours import is_copy
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.plan.written.places import (
    ANOTHER,
    is_half_copied,
    kept_offences,
    place_offences,
    taken_bytes,
    unfinished_offences,
)  # fmt: skip
from safeshard.streamer.run.downloads import Download, download_of, download_offences, forward_reads, shard_cache
from safeshard.streamer.run.factors.factor_layers import Layer, file_of, finished, host_bytes, needs_of, write_layers
from safeshard.streamer.run.flow.reading import choose_reading
from safeshard.streamer.sources import LocalSource, open_source
from safeshard.streamer.write.journal import Journal
from safeshard.streamer.write.staging import open_journal, publish, remove, settle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """What came of a calibration: the folder, and the modules without a factor, with the reason.

    Of a dry run `bytes_to_write` is what the factors take on disk at most (linears with one input share one), and
    `memory` what a layer takes at least besides the hidden states.
    """

    output: Path
    reverted: Mapping[str, str]
    bytes_to_write: int = 0
    memory: int = 0
    download: Download = field(default_factory=Download)


def run_calibrate(options: Calibrate, run: RunOptions) -> Factors:
    """Write factors; an interrupted run resumes after the last layer whose factors its journal holds.

    Raises:
        RequestError: the model or the data is refused, the output exists, another run is at work on it, or there is too
            little room; nothing was written.
        RunError: it failed underway; the same call resumes.
    """
    device = torch.device(run.resolved_device())
    output = options.output.absolute()
    staging = staging_of(output)
    if offences := list(place_offences(options.output, [options.aligned])):
        raise RequestError(offences)
    _check_places(output, staging, run.overwrite)
    aligned = open_checkpoint(open_source(options.aligned, shard_cache(run)))
    calibration = Calibration(aligned, options, forward_dtype(aligned, options.dtype))
    for source, notes in calibration.notes().items():
        for note in notes:
            log.warning("%s: %s", source, note)
    need, size = host_bytes(calibration, device), _disk_bytes(calibration)
    _check_room(output, int(run.memory), need, size + COPIES * calibration.hidden_bytes)
    fetched = download_of(list(forward_reads(aligned)))
    if offences := list(download_offences(fetched, run)):
        raise RequestError(offences)
    if run.dry_run:
        return Factors(output, {}, size, need, fetched)
    fingerprint = _fingerprint(calibration, options, device)
    with clear_errors(staging):
        if not run.overwrite and (output / INDEX).is_file():  # killed in its last step
            Journal.open(_journal_of(staging, output), fingerprint).close()
            settle(staging, output)
            return Factors(output, _failed(SavedFactors(str(output), aligned).index))
        journal = open_journal(staging, output, fingerprint, run.overwrite)
    with journal:
        try:
            layers = finished(calibration, journal)
            choose_reading(run.io, [aligned.source])
            with exact_products():
                layers += write_layers(calibration, len(layers), options, run, device, journal)
            index = _index(calibration, options, layers)
            with clear_errors(output):
                write_file(staging / INDEX, (index.model_dump_json(by_alias=True, indent=1) + "\n").encode())
                clear_states([staging])
                publish(staging, output, (), run.overwrite, last=INDEX)
        except BaseException:
            if not journal.entries("layer"):
                with contextlib.suppress(OSError):
                    remove(staging, output)  # nothing to resume
            raise
    return Factors(output, _failed(index))


def _fingerprint(calibration: Calibration, options: Calibrate, device: torch.device) -> dict[str, Any]:
    """All that the factors depend on, to notice on resume that something changed."""
    aligned = calibration.aligned
    inputs = {"aligned": _model_input(aligned), **calibration.inputs()}
    times = {}
    if isinstance(aligned.source, LocalSource) and aligned.source.revision is None:  # as in plan/identity
        times = {file.name: aligned.source.local_path(file.name).stat().st_mtime_ns for file in aligned.files}
    return {
        "safeshard": version("safeshard"), "torch": torch.__version__, "device": device.type,
        "options": _decisive(options),
        "files": [INDEX, *(file_of(number) for number in range(len(calibration.planned())))],
        "inputs": {role: given.model_dump(mode="json") for role, given in inputs.items()},
        "modified": times, "hidden_states": calibration.states_key(device, next(iter(calibration.prompts.values()))),
    }  # fmt: skip


def _decisive(options: Calibrate) -> dict[str, Any]:
    return options.model_dump(mode="json", exclude={"aligned", *DATA.values(), "output"})


def _check_places(output: Path, staging: Path, overwrite: bool) -> None:
    offences = list(unfinished_offences(staging))
    if os.path.lexists(output) and not is_half_copied(staging, output, INDEX):
        if overwrite or (output / JOURNAL_NAME).is_file():
            offences += kept_offences(output, str(output), INDEX)
        else:
            offences.append(Offence("--output", str(output), "a new folder", "one that exists already", ANOTHER))
    if offences:
        raise RequestError(offences)


def _journal_of(staging: Path, output: Path) -> Path:
    """The journal that tells whose a finished output is: where it was copied, its own is only a mark."""
    copied = is_copy(output) and (staging / JOURNAL_NAME).is_file()
    return (staging if copied else output) / JOURNAL_NAME


def _check_room(output: Path, memory: int, need: int, size: int) -> None:
    if need > memory:
        expected, remedy = f"at least {need} bytes for one layer", "raise --memory"
        raise RequestError(Offence("--memory", "", expected, str(memory), remedy))
    parent = next(folder for folder in output.parents if folder.exists())
    size -= taken_bytes(output)
    if size > (free := shutil.disk_usage(parent).free):
        remedy = "free some, or choose another disk"
        raise RequestError(Offence("--output", str(parent), f"up to {size} bytes of free space", str(free), remedy))


def _disk_bytes(calibration: Calibration) -> int:
    needs = needs_of(calibration)
    return sum(
        4 * (needs.dampings * group.width**2 + needs.grams * (1 + group.keeps) * packed_size(group.width))
        for layer in calibration.planned()
        for group in layer
    )


def _index(calibration: Calibration, options: Calibrate, layers: Sequence[Layer]) -> FactorIndex:
    inputs = calibration.inputs()
    with_experts = any(group.tokens is not None for layer in layers for group in layer.groups)
    return FactorIndex(
        schema=WITH_EXPERTS if with_experts else SCHEMA,
        safeshard=version("safeshard"), torch=torch.__version__, aligned=_model_input(calibration.aligned),
        sample=sample_weights(calibration.aligned),
        calibration=inputs["calibration"], task_data=inputs.get("task_data"), keep_data=inputs.get("keep_data"),
        options=_decisive(options),
        layers=tuple(layer.groups for layer in layers),
        reverted={name: why for layer in layers for name, why in layer.reverted.items()},
    )  # fmt: skip


def _failed(index: FactorIndex) -> dict[str, str]:
    """The modules that have no factor, whether they have a Gram or not, and why."""
    reasons = {name: g.reason for layer in index.layers for g in layer if g.reason for name in g.modules}
    return reasons | index.reverted


def _model_input(aligned: Checkpoint) -> Input:
    files = tuple(file.entry for file in aligned.files)
    return Input(source=aligned.source.spec, revision=aligned.source.revision, files=files)
