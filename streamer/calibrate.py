"""`calibrate`: run the aligned model over the calibration data once and save every factor, for later jobs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.hashing import hash_bytes
from safeshard.manifests.schema import Input, InputFile
from safeshard.streamer.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.factor_files import INDEX, SCHEMA, FactorIndex, SavedGroup
from safeshard.streamer.factors import Calibration, Group, forward_dtype
from safeshard.streamer.methods.safedelta import Calibrated
from safeshard.streamer.options import Dtype, Place, RunOptions
from safeshard.streamer.progress import Progress
from safeshard.streamer.sources import open_source
from safeshard.streamer.steps import workers_for
from safeshard.streamer.stream import Buffers, Clock, Step, run_steps
from safeshard.streamer.writer import clear_errors


class Calibrate(Calibrated):
    """Save the factors of an aligned model's Gram matrices, for any number of Safe Delta jobs."""

    aligned: Place = Field(description="aligned model: a folder, hf://org/name@revision, or a URL")
    output: Path = Field(description="folder to write; must not exist")
    dtype: Dtype | None = Field(None, description="dtype of the forward pass (default: the aligned checkpoint's)")


def run_calibrate(options: Calibrate, run: RunOptions) -> Path:
    """Write factors; return their folder.

    Raises:
        RequestError: the model or the data is refused, or the output exists; nothing was written.
        RunError: it failed underway.
    """
    device = torch.device(run.resolved_device())
    output = options.output.absolute()
    if output.exists() and not (run.overwrite and (output / INDEX).is_file()):
        raise RequestError(
            Offence("--output", str(options.output), "a new folder", "it exists", "choose another, or --overwrite")
        )
    aligned = open_checkpoint(open_source(options.aligned))
    calibration = Calibration(aligned, options, forward_dtype(aligned, options.dtype))
    staging = output.with_name(output.name + ".partial")
    with clear_errors(staging):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    if run.dry_run:
        staging.rmdir()
        return output
    try:
        index = _write_layers(calibration, options, run, device, staging)
        with clear_errors(output):
            _write(staging / INDEX, index.model_dump_json(by_alias=True, indent=1).encode())
            if output.exists():
                shutil.rmtree(output)
            staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _write_layers(
    calibration: Calibration, options: Calibrate, run: RunOptions, device: torch.device, staging: Path
) -> FactorIndex:
    layers: list[tuple[SavedGroup, ...]] = []
    reverted: dict[str, str] = {}
    with Progress(len(calibration.modules), run.quiet, unit="module") as progress:
        for number, groups in enumerate(calibration.layers(device, int(run.memory), staging)):
            file = f"factors-{number:05d}.safetensors"
            factors, failed = _factors(groups, options.percdamp, run, device)
            with clear_errors(staging):
                save_file({name: u for name, (u, _) in factors.items()}, staging / file, {"format": "pt"})
                _sync(staging / file)
            layers.append(
                tuple(
                    _saved(group, file, *factors[group.modules[0]]) for group in groups if group.modules[0] in factors
                )
            )
            reverted |= {
                name: failed[group.modules[0]]
                for group in groups
                if group.modules[0] in failed
                for name in group.modules
            }
            progress.done(groups[0].modules[0], sum(len(group.modules) for group in groups))
    return FactorIndex(
        schema=SCHEMA,
        safeshard=version("safeshard"), torch=torch.__version__, aligned=_model_input(calibration.aligned),
        calibration=calibration.inputs()["calibration"], options=options.model_dump(mode="json", exclude={"output"}),
        layers=tuple(layers), reverted=reverted,
    )  # fmt: skip


def _factors(
    groups: Sequence[Group], percdamp: float, run: RunOptions, device: torch.device
) -> tuple[dict[str, tuple[Tensor, float]], dict[str, str]]:
    """Factor a layer's Grams side by side: by leading module, (U on the host, damping), or why there is none."""
    by_name = {group.modules[0]: group for group in groups}
    done: dict[str, tuple[Tensor, float]] = {}
    failed: dict[str, str] = {}

    def compute(step: Step, loaded: Mapping[Hashable, Tensor]) -> None:
        factor = by_name[step.name].factor(percdamp, loaded, device)
        if isinstance(factor, str):
            failed[step.name] = factor
        else:
            done[step.name] = (factor.u.cpu(), factor.damping)

    steps = [Step(name, scratch=group.scratch) for name, group in by_name.items()]
    buffers = Buffers(max(int(run.memory), *(step.cost for step in steps)))
    run_steps(steps, compute, buffers=buffers, clock=Clock(), workers=workers_for(device))
    return done, failed


def _saved(group: Group, file: str, u: Tensor, damping: float) -> SavedGroup:
    digest = hash_bytes(u.view(-1).view(torch.uint8).numpy().data)
    return SavedGroup(modules=group.modules, file=file, tensor=group.modules[0], damping=damping, blake3=digest)


def _model_input(aligned: Checkpoint) -> Input:
    files = tuple(InputFile(name=f.name, size=f.size, header_sha256=f.sha256) for f in aligned.files)
    return Input(source=aligned.source.spec, revision=aligned.source.revision, files=files)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
