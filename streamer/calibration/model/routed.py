"""What the experts of one layer are given, token by token, and what they give: on the host, for one expert at a time.

The layer runs twice. First up to its experts, whose inputs are kept (`capture`); then, once every expert has added its
part (`safeshard.streamer.calibration.expert_grams`), all of it with what they gave (`replay`). So the weights of one
expert after the other are read once, for all batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from safeshard.manifests.errors import RunError
from safeshard.streamer.calibration.model.batches import Batch
from safeshard.streamer.calibration.model.experts import Experts


class _Captured(Exception):
    """A layer has come to its experts."""


class Routed:
    """The tokens of all batches, one row each, without padding; used for one layer after the other.

    Attributes:
        samples: the sample of each token.
        inputs, outputs: tokens x width, in the dtype of the forward pass.
        index, weights: tokens x experts of a token; an index beyond the experts is none of them.
    """

    def __init__(self, batches: Sequence[Batch], allocate: Callable[[int], Tensor]) -> None:
        self._batches, self._allocate = batches, allocate
        starts = [0, *accumulate(len(batch.rows) for batch in batches)]
        self._ranges = [slice(*pair) for pair in pairwise(starts)]
        self.samples = torch.cat([torch.tensor(b.samples)[b.rows.cpu() // b.tokens.shape[1]] for b in batches])
        self._buffers = torch.empty(0), torch.empty(0)
        self._routes: dict[int, tuple[Tensor, Tensor]] = {}
        self._running = threading.local()
        self.inputs = self.outputs = self.index = self.weights = torch.empty(0)

    def __len__(self) -> int:
        return len(self.samples)

    @contextmanager
    def capture(self, experts: Experts) -> Iterator[Callable[[int, Callable[[], object]], None]]:
        """Inside, what is given runs a batch's layer up to its experts; on the way out their inputs are complete."""
        numel = len(self) * experts.width
        if self._buffers[0].numel() != numel:
            self._buffers = self._allocate(numel), self._allocate(numel)
        self.inputs, self.outputs = (buffer.view(len(self), experts.width) for buffer in self._buffers)
        self._routes = {}

        def keep(tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            number = self._running.number
            batch = self._batches[number]
            if tokens.ndim != 2 or len(tokens) != batch.tokens.numel() or index.shape != weights.shape:
                got = f"{list(tokens.shape)} with {list(index.shape)} experts for {batch.tokens.numel()} tokens"
                raise RunError(f"{experts.path} is given {got}", "calibration takes no such model")
            rows = batch.rows.to(tokens.device)
            self.inputs[self._ranges[number]].copy_(tokens[rows])
            self._routes[number] = index[rows].cpu().long(), weights[rows].cpu()
            raise _Captured

        def run(number: int, layer: Callable[[], object]) -> None:
            self._running.number = number
            try:
                layer()
            except _Captured:
                return
            raise RunError(f"{experts.path} took no part in the forward pass", "calibration takes no such model")

        with experts.routed_to(keep):
            yield run
        routes = [self._routes.pop(number) for number in range(len(self._batches))]
        self.index, self.weights = (torch.cat(parts) for parts in zip(*routes, strict=True))
        self.outputs.zero_()

    @contextmanager
    def replay(self, experts: Experts) -> Iterator[Callable[[int], None]]:
        """Inside, experts give what is in `outputs`. Before a batch, its number is to be told."""

        def give(tokens: Tensor, *_: Tensor) -> Tensor:
            number = self._running.number
            given = torch.zeros_like(tokens)
            given[self._batches[number].rows.to(tokens.device)] = self.outputs[self._ranges[number]].to(tokens.device)
            return given

        with experts.routed_to(give):
            yield lambda number: setattr(self._running, "number", number)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert, in order, and its weight for each."""
        rows, places = (self.index == expert).nonzero(as_tuple=True)
        return rows, self.weights[rows, places]
