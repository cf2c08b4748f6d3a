"""A layer's part up to its experts, and these one after the other, for all batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from safeshard.streamer.calibration.expert_grams import ExpertGrams, Portion
from safeshard.streamer.calibration.model.batches import Batch
from safeshard.streamer.calibration.model.experts import Experts
from safeshard.streamer.calibration.model.routed import Routed
from safeshard.streamer.calibration.model.weights import Weights
from safeshard.streamer.device import wait

BUFFERS = 3  # as large as the hidden states: these, what experts are given, and what they give


class ExpertStage:
    """What the experts of one layer after the other are run with."""

    def __init__(
        self, weights: Weights, batches: list[Batch], allocate: Callable[[int], Tensor], device: torch.device,
        dtype: torch.dtype, workers: int,
    ) -> None:  # fmt: skip
        self._weights, self._device, self._dtype, self._workers = weights, device, dtype, workers
        self._scale = 2 / sum(len(batch.samples) for batch in batches)
        self._routed, self._numbers = Routed(batches, allocate), range(len(batches))

    def portions(
        self,
        experts: Experts,
        run: Callable[[int], object],
        each: Callable[[Callable[[int], None], Iterable[int]], None],
        inside: Callable[[], AbstractContextManager[None]],
        wanted: bool,
    ) -> Iterator[Portion]:
        """The Grams of a layer's experts, portion by portion; none of them where they are not `wanted`.

        Args:
            run: runs a batch through the layer.
            each: runs something for each batch.
            inside: is entered whenever something is computed.
        """
        with inside():
            with self._routed.capture(experts) as capture:
                each(lambda number: capture(number, lambda: run(number)), self._numbers)
            portions = ExpertGrams(
                experts, self._routed, self._weights, self._device, self._dtype, wanted=wanted, scale=self._scale,
                workers=self._workers,
            ).portions()  # fmt: skip
        while True:
            with inside():
                portion = next(portions, None)
                if self._device.type == "cuda":
                    wait(self._device)  # whoever takes the Grams works on a stream of its own
            if portion is None:
                return
            if wanted:
                yield portion

    def replaying(self, experts: Experts) -> AbstractContextManager[Callable[[int], None]]:
        """Inside, experts give what they gave; before a batch is run its number is to be told."""
        return self._routed.replay(experts)
