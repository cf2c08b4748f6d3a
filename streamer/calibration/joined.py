"""Saved Grams of the safe inputs, and a calibration run for those whose outputs must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        self.kept_bytes, self.ahead_bytes = run.kept_bytes, run.ahead_bytes
        self.layer_numbers = run.layer_numbers

    @property
    def bytes_read(self) -> int:
        return self.run.bytes_read

    def inputs(self) -> dict[str, Input]:
        return self.saved.inputs() | self.run.inputs()

    def notes(self) -> dict[str, tuple[str, ...]]:
        return self.run.notes()

    def planned(self) -> list[list[Group]]:
        keeps, own = len(self.run.prompts), self._saved()
        return [[replace(group, keeps=keeps) for group in _of(layer, own)] for layer in self.run.planned()]

    def layers(self, device: torch.device, budget: int, saved: HiddenStates, workers: int) -> Iterator[list[Group]]:
        own = self._saved()
        for made in self.run.layers(device, budget, saved, workers):
            kept = {name: group.kept for group in made for name in group.modules}
            groups = _of(made, own)
            made.clear()
            yield [replace(group, kept=kept[group.modules[0]], keeps=len(kept[group.modules[0]])) for group in groups]

    def _saved(self) -> dict[str, Group]:
        return {name: group for layer in self.saved.planned() for group in layer for name in group.modules}


def _of(layer: list[Group], saved: Mapping[str, Group]) -> list[Group]:
    """The saved groups of a layer's linears, each once."""
    names = (name for group in layer for name in group.modules if name in saved)
    return list({id(saved[name]): saved[name] for name in names}.values())
