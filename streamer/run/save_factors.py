"""`calibrate`: run the aligned model over the calibration data once and save Grams and factors, for later jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels.calibrated.factor import Factor
from safeshard.kernels.calibrated.half import packed_size
from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_tensor_region
from safeshard.manifests.safetensors_header import HeaderError, layout, read_header
from safeshard.manifests.schema import JOURNAL_NAME, Input
from safeshard.streamer.calibration.data.data_files import DATA
from safeshard.streamer.calibration.factor_files import (
    INDEX,
    SCHEMA,
    WITH_EXPERTS,
    FactorIndex,
    SavedFactors,
    SavedGram,
    SavedGroup,
    sample_weights,
)
from safeshard.streamer.calibration.factors import Calibration, forward_dtype
from safeshard.streamer.calibration.groups import Group, Needs, device_bytes, hash_host, resident_bytes
from safeshard.streamer.calibration.hidden_states import COPIES, HiddenStates, clear_states
from safeshard.streamer.clock import Clock
from safeshard.streamer.device import exact_products, tried_twice
from safeshard.streamer.disk import clear_errors, open_own, sync_path, write_all, write_file
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.inputs.read import Step
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.options import Options, RunOptions
from safeshard.streamer.plan.ours import is_copy
from safeshard.streamer.plan.written.places import (
    is_half_copied,
    kept_offences,
    place_offences,
    staging_of,
    taken_bytes,
    unfinished_offences,
)  # fmt: skip
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.calibrated import batches_at_once
from safeshard.streamer.run.downloads import Download, download_of, download_offences, forward_reads, shard_cache
from safeshard.streamer.run.flow.reading import choose_reading
from safeshard.streamer.run.flow.steps import workers_for
from safeshard.streamer.run.flow.stream import Buffers, run_steps
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


class _Layer(Options):
    """A decoder layer, or some of its experts, in the journal: factors, and why modules have none."""

    number: int
    groups: tuple[SavedGroup, ...]
    reverted: dict[str, str]

    def is_intact(self, folder: Path, modules: Sequence[str]) -> bool:
        """Whether the layer's file holds factors of just these modules, byte for byte."""
        path = folder / _file(self.number)
        named = [*(name for group in self.groups for name in group.modules), *self.reverted]
        try:
            with path.open("rb") as file:
                fd, size = file.fileno(), os.fstat(file.fileno()).st_size
                tensors = read_header(path.name, size, lambda start, stop: os.pread(fd, stop - start, start)).tensors
                hashes = {tensors[name]: blake3 for group in self.groups for name, blake3 in group.tensors().items()}
                own = all(group.file == path.name for group in self.groups)
                return (sorted(named), own) == (sorted(modules), True) and all(
                    hash_tensor_region(fd, ref.offset, ref.nbytes) == blake3 for ref, blake3 in hashes.items()
                )
        except (OSError, EOFError, HeaderError, KeyError):
            return False


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
    need, size = _host_bytes(calibration, device), _disk_bytes(calibration)
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
            layers = _finished(calibration, journal)
            choose_reading(run.io, [aligned.source])
            with exact_products():
                layers += _write_layers(calibration, len(layers), options, run, device, journal)
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
        "files": [INDEX, *(_file(number) for number in range(len(calibration.planned())))],
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
            expected, remedy = "a folder that does not exist", "choose another, or --overwrite"
            offences.append(Offence("--output", str(output), expected, "it exists", remedy))
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


def _host_bytes(calibration: Calibration, device: torch.device) -> int:
    """Host memory that a layer takes besides the hidden states: on a device its finished factors, and weights ahead."""
    if device.type != "cpu":
        return resident_bytes(calibration, _needs(calibration)) + calibration.ahead_bytes
    needs = _needs(calibration)
    steps = [_step(group, needs) for layer in calibration.planned() for group in layer]
    return device_bytes(calibration, steps, needs)


def _needs(calibration: Calibration) -> Needs:
    """What is saved of a group: both are held until its layer is written."""
    save = getattr(calibration.options, "save", "both")
    return Needs(save != "factors", save != "grams", solves=False)


def _disk_bytes(calibration: Calibration) -> int:
    needs = _needs(calibration)
    return sum(
        4 * (needs.dampings * group.width**2 + needs.grams * (1 + group.keeps) * packed_size(group.width))
        for layer in calibration.planned()
        for group in layer
    )


def _step(group: Group, needs: Needs) -> Step:
    return Step(group.modules[0], scratch=group.scratch(needs))


def _finished(calibration: Calibration, journal: Journal) -> list[_Layer]:
    """The layers, from the first on, whose factors the journal and the files hold."""
    records = journal.sound("layer", lambda r: _Layer(**{key: value for key, value in r.items() if key != "kind"}))
    found = {layer.number: layer for layer in records}
    layers = []
    for number, groups in enumerate(calibration.planned()):
        modules = [name for group in groups for name in group.modules]
        if number not in found or not found[number].is_intact(journal.path.parent, modules):
            break
        layers.append(found[number])
    if len(layers) < len(found):
        log.warning("%s: damaged from layer %d on: those are factored again", journal.path.parent, len(layers))
    return layers


def _write_layers(
    calibration: Calibration, first: int, options: Calibrate, run: RunOptions, device: torch.device, journal: Journal
) -> list[_Layer]:
    """Write the factors of all layers from the `first` on."""
    staging = journal.path.parent
    left = calibration.planned()[first:]
    if not left:
        return []
    written = []
    memory = int(run.memory)
    hidden = min(memory // 2, memory - _host_bytes(calibration, device))
    needs = _needs(calibration)
    buffers = Buffers(memory - hidden - resident_bytes(calibration, needs) - calibration.kept_bytes)
    workers = batches_at_once(calibration, device, memory - hidden, needs)
    numbers = calibration.layer_numbers
    layers = calibration.layers(device, hidden, HiddenStates([staging], numbers[first]), workers)
    count = sum(len(group.modules) for groups in left for group in groups)
    with Progress(count, run.quiet, unit="module") as progress:
        for number, groups in enumerate(layers, numbers.index(numbers[first])):
            if number < first:  # a layer is run as a whole, of whose experts some are saved
                groups.clear()
                continue
            if needs.dampings:
                _factor(groups, options.percdamp, needs, device, buffers)
            saved, failed = _save(groups, staging / _file(number), options.percdamp, needs, device)
            written.append(_Layer(number=number, groups=saved, reverted=failed))
            journal.record("layer", **written[-1].model_dump(mode="json"))
            with clear_errors(staging):
                journal.commit()
            progress.done(groups[0].modules[0] if groups else str(number), sum(len(g.modules) for g in groups))
            groups.clear()
    return written


def _file(number: int) -> str:
    return f"factors-{number:05d}.safetensors"


def _index(calibration: Calibration, options: Calibrate, layers: Sequence[_Layer]) -> FactorIndex:
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


def _factor(groups: Sequence[Group], percdamp: float, needs: Needs, device: torch.device, buffers: Buffers) -> None:
    """Factor a layer's Grams side by side, each single-threaded: the same bytes as in a job's own calibration."""
    by_name = {group.modules[0]: group for group in groups}

    def compute(step: Step, loaded: Mapping[Hashable, Tensor]) -> None:
        group = by_name[step.name]
        tried_twice(device, step.name, lambda: group.factor(percdamp, needs, loaded, device))

    steps = [_step(group, needs) if device.type == "cpu" else Step(group.modules[0]) for group in groups]
    workers = workers_for(device) if device.type == "cpu" else 1  # one factor may fill a device
    run_steps(steps, compute, buffers=buffers, clock=Clock(), workers=workers, device=device)


def _save(
    groups: Sequence[Group], file: Path, percdamp: float, needs: Needs, device: torch.device
) -> tuple[tuple[SavedGroup, ...], dict[str, str]]:
    """Write a layer's factors and Grams; return their places, and the modules with neither."""
    tensors: dict[str, Tensor] = {}
    saved: list[SavedGroup] = []
    failed: dict[str, str] = {}
    for group in groups:
        name = group.modules[0]
        fields: dict[str, Any] = {"modules": group.modules, "file": file.name}
        if group.tokens is not None:
            fields |= {"tokens": group.tokens, "shared": group.shared}
        if needs.grams:
            packed = {f"{name}:{role}": gram for role, gram in group.packed().items()}
            tensors |= packed
            fields["grams"] = {
                key.rpartition(":")[2]: SavedGram(tensor=key, blake3=hash_host(gram)) for key, gram in packed.items()
            }
        factor = group.factor(percdamp, needs, {}, device) if needs.dampings else ""
        if isinstance(factor, Factor):
            u = tensors[name] = factor.u.cpu()
            fields |= {"tensor": name, "damping": factor.damping, "blake3": hash_host(u), **_added(factor)}
        elif needs.grams:
            fields["reason"] = factor
        else:
            failed |= dict.fromkeys(group.modules, factor)
            continue
        saved.append(SavedGroup(**fields))
    with clear_errors(file.parent):
        _write_tensors(file, tensors)
    return tuple(saved), failed


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write fp32 tensors as the safetensors library would, into a file of ours."""
    header, refs = layout(file.name, [(name, "F32", tuple(t.shape)) for name, t in tensors.items()], {"format": "pt"})
    fd = open_own(file, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(fd, 0)
        write_all(fd, memoryview(header), 0)
        for name, tensor in tensors.items():
            write_all(fd, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, refs[name].offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_path(file.parent)


def _added(factor: Factor) -> dict[str, Any]:
    """What was added to a Gram's diagonal: the same everywhere, and 1 more where the input was never active."""
    if factor.added is None:
        return {}
    least = factor.added.min()
    dead = (factor.added > least + 0.5).nonzero().flatten().tolist()
    return {"added": float(least), "dead": tuple(dead)}


def _model_input(aligned: Checkpoint) -> Input:
    files = tuple(file.entry for file in aligned.files)
    return Input(source=aligned.source.spec, revision=aligned.source.revision, files=files)
