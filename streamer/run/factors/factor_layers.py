"""Layers of factors: made, written, and found again in an unfinished output."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels.calibrated.factor import Factor
from safeshard.manifests.hashing import hash_tensor_region
from safeshard.manifests.safetensors_header import HeaderError, layout, read_header
from safeshard.streamer.calibration.factor_files import (
    SavedGram,
    SavedGroup,
)
from safeshard.streamer.calibration.factors import Calibration
from safeshard.streamer.calibration.groups import Group, Needs, device_bytes, hash_host, resident_bytes
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.clock import Clock
from safeshard.streamer.device import tried_twice
from safeshard.streamer.disk import clear_errors, open_own, sync_path, write_all
from safeshard.streamer.inputs.read import Step
from safeshard.streamer.methods.calibrate import Calibrate
from safeshard.streamer.options import Options, RunOptions
from safeshard.streamer.progress import Progress
from safeshard.streamer.run.calibrated import batches_at_once
from safeshard.streamer.run.flow.steps import workers_for
from safeshard.streamer.run.flow.stream import Buffers, run_steps
from safeshard.streamer.write.journal import Journal

log = logging.getLogger(__name__)


class Layer(Options):
    """A decoder layer, or some of its experts, in the journal: factors, and why modules have none."""

    number: int
    groups: tuple[SavedGroup, ...]
    reverted: dict[str, str]

    def is_intact(self, folder: Path, modules: Sequence[str]) -> bool:
        """Whether the layer's file holds factors of just these modules, byte for byte."""
        path = folder / file_of(self.number)
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


def host_bytes(calibration: Calibration, device: torch.device) -> int:
    """Host memory that a layer takes besides the hidden states: on a device its finished factors, and weights ahead."""
    if device.type != "cpu":
        return resident_bytes(calibration, needs_of(calibration)) + calibration.ahead_bytes
    needs = needs_of(calibration)
    steps = [_step(group, needs) for layer in calibration.planned() for group in layer]
    return device_bytes(calibration, steps, needs)


def needs_of(calibration: Calibration) -> Needs:
    """What is saved of a group: both are held until its layer is written."""
    save = getattr(calibration.options, "save", "both")
    return Needs(save != "factors", save != "grams", solves=False)


def _step(group: Group, needs: Needs) -> Step:
    return Step(group.modules[0], scratch=group.scratch(needs))


def finished(calibration: Calibration, journal: Journal) -> list[Layer]:
    """The layers, from the first on, whose factors the journal and the files hold."""
    records = journal.sound("layer", lambda r: Layer(**{key: value for key, value in r.items() if key != "kind"}))
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


def write_layers(
    calibration: Calibration, first: int, options: Calibrate, run: RunOptions, device: torch.device, journal: Journal
) -> list[Layer]:
    """Write the factors of all layers from the `first` on."""
    staging = journal.path.parent
    left = calibration.planned()[first:]
    if not left:
        return []
    written = []
    memory = int(run.memory)
    hidden = min(memory // 2, memory - host_bytes(calibration, device))
    needs = needs_of(calibration)
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
            saved, failed = _save(groups, staging / file_of(number), options.percdamp, needs, device)
            written.append(Layer(number=number, groups=saved, reverted=failed))
            journal.record("layer", **written[-1].model_dump(mode="json"))
            with clear_errors(staging):
                journal.commit()
            progress.done(groups[0].modules[0] if groups else str(number), sum(len(g.modules) for g in groups))
            groups.clear()
    return written


def file_of(number: int) -> str:
    return f"factors-{number:05d}.safetensors"


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
