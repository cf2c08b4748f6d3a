"""Saved Grams of the safe inputs, and a calibration run for those whose outputs must stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from safeshard.manifests.schema import Input
from safeshard.streamer.calibration.factors import Calibration
from safeshard.streamer.calibration.groups import FactorSource, Group
from safeshard.streamer.calibration.hidden_states import HiddenStates


class Joined:
    """Of each layer the saved groups, with the Grams of kept inputs that a run of the aligned model gives."""

    def __init__(self, saved: FactorSource, run: Calibration) -> None:
        self.saved, self.run = saved, run
        self.modules = saved.modules & run.modules
        self.forward_bytes, self.batch_bytes, self.hidden_bytes = run.forward_bytes, run.batch_bytes, run.hidden_bytes
        self.ahead_bytes = run.ahead_bytes

    @property
    def bytes_read(self) -> int:
        return self.run.bytes_read

    def inputs(self) -> dict[str, Input]:
        return self.saved.inputs() | self.run.inputs()

    def notes(self) -> dict[str, tuple[str, ...]]:
        return self.run.notes()

    def planned(self) -> list[list[Group]]:
        keeps = len(self.run.prompts)
        return [[replace(group, keeps=keeps) for group in layer] for layer in self.saved.planned()]

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        own = self.saved.layers(device, 0, saved, workers)
        for _ in range(saved.first):
            next(own)
        for groups, made in zip(own, self.run.layers(device, budget, saved, workers), strict=False):
            kept = {name: group.kept for group in made for name in group.modules}
            made.clear()
            yield [replace(group, kept=kept[group.modules[0]], keeps=len(kept[group.modules[0]])) for group in groups]
