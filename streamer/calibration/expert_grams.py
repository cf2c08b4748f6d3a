"""Gram matrices of the experts of one layer, a few of them at a time, and what these experts give.

An expert's Gram is that of the tokens routed to it. Where they are fewer than 0.5 % of all, or than a quarter of its
inputs, it is shrunk toward the Gram of all tokens, the more so the fewer there are (Ledoit and Wolf's form):

    H = (1 - a) H_routed + a H_all tr(H_routed) / tr(H_all)        a = 1 - tokens / needed

Without any token H_all stands in, as that of one token. For an expert's last linear H_all is of all tokens run through
that expert: what experts have inside cannot be compared.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from safeshard.kernels.calibrated import gram as gram_kernel
from safeshard.manifests.errors import RunError
from safeshard.streamer.calibration.gram_collector import not_finite
from safeshard.streamer.calibration.model.experts import Experts
from safeshard.streamer.calibration.model.routed import Routed
from safeshard.streamer.calibration.model.weights import Expert, Weights

CHUNK = 4096  # tokens of an expert that are computed at once: part of what decides the last bits of a Gram
PORTION_BYTES = 256 << 20  # of Grams that are held at once, at least one expert's; what files hold follows from it
FEW = 0.005  # of all tokens
QUARTER = 0.25  # of an expert's inputs


@dataclass(frozen=True)
class Seen:
    """How many tokens a Gram is of, and the share of the Gram of all tokens in it."""

    tokens: int
    shared: float = 0.0


@dataclass(frozen=True)
class Portion:
    """Grams of some experts of a layer by the names of their linears; gate and up share one."""

    grams: dict[str, Tensor]
    seen: dict[str, Seen]


def portions(experts: Experts) -> list[range]:
    """The experts of a layer by those whose Grams are held at once: by their sizes alone, whatever memory there is."""
    each = 4 * (experts.width**2 + experts.inner**2)
    step = max(1, PORTION_BYTES // each)
    return [range(start, min(start + step, experts.count)) for start in range(0, experts.count, step)]


def needed_tokens(tokens: int, inputs: int) -> float:
    """How many tokens a Gram must be of to stand alone."""
    return max(FEW * tokens, QUARTER * inputs)


def scratch_bytes(experts: Experts, dtype: torch.dtype) -> int:
    """What computing one expert takes besides its weights and Grams: activations of a chunk, and slabs in fp32."""
    numbers = 3 * experts.width + 5 * experts.inner
    return CHUNK * (numbers * dtype.itemsize + 4 * max(experts.width, experts.inner))


class ExpertGrams:
    """Runs the experts of one layer, whose inputs have been captured."""

    def __init__(
        self, experts: Experts, routed: Routed, weights: Weights, device: torch.device, dtype: torch.dtype,
        *, wanted: bool, scale: float, workers: int,
    ) -> None:  # fmt: skip
        self._experts, self._routed, self._weights = experts, routed, weights
        self._device, self._dtype, self._wanted, self._scale = device, dtype, wanted, scale
        self._workers = 1 if device.type != "cpu" else workers
        self._next, self._failed = 0, experts.count  # the first expert that has failed
        self._changed = threading.Condition()
        counts = torch.bincount(routed.index.flatten().clamp(0, experts.count), minlength=experts.count + 1)
        few = int(counts[: experts.count].min()) < needed_tokens(len(routed), experts.width)
        self._all = self._gram_of_all() if wanted and few else None

    def portions(self) -> Iterator[Portion]:
        """The Grams of all experts, portion by portion; nothing in them where they are not wanted."""
        yield from map(self._portion, portions(self._experts))

    def _portion(self, chosen: range) -> Portion:
        grams: dict[str, Tensor] = {}
        seen: dict[str, Seen] = {}
        for index, made in zip(chosen, self._each(chosen), strict=True):
            for role, (gram, tokens) in made.items():
                name = self._weights.linear(self._experts, index, role)
                grams[name], seen[name] = gram, tokens
        return Portion(grams, seen)

    def _each(self, chosen: range) -> Iterator[Mapping[str, tuple[Tensor, Seen]]]:
        if self._workers == 1:
            yield from map(self._expert, chosen)
            return
        with ThreadPoolExecutor(self._workers, "expert", torch.set_num_threads, (1,)) as pool:
            yield from pool.map(self._expert, chosen)

    @torch.no_grad()
    def _expert(self, index: int) -> dict[str, tuple[Tensor, Seen]]:
        with self._turn(index) as take_turn:
            return self._grams(index, take_turn)

    def _grams(self, index: int, take_turn: Callable[[], None]) -> dict[str, tuple[Tensor, Seen]]:
        experts, routed = self._experts, self._routed
        rows, scales = routed.of(index)
        count, some = len(rows), len(rows) > 0
        starved = self._wanted and count < needed_tokens(len(routed), experts.inner)
        sums = [self._zeros(size) for size in (experts.width, experts.inner)] if self._wanted else []
        if not some and not starved:
            take_turn()
            return {}
        expert = self._weights.expert(experts, index).to(self._device, self._dtype)
        for part, scale in zip(torch.split(rows, CHUNK), torch.split(scales, CHUNK), strict=True):
            if not some:
                break
            x, given = self._given(part, scale), scale.to(self._device)[:, None]
            h = experts.between(x, expert, index)
            y = experts.after(h, expert, index)
            y = y if experts.scales_inputs else y * given
            for total, states in zip(sums, (x, h), strict=False):
                gram_kernel.accumulate(total, states)
                self._refuse_not_finite(index, total, states, part)
            take_turn()
            routed.outputs.index_add_(0, part, y.to(self._dtype).cpu())
        take_turn()
        if not self._wanted:
            return {}
        inner = self._inside_of_all(expert, index) if starved else None
        seen = [self._shrink(*each, count) for each in zip(sums, (self._all, inner), strict=True)]
        for total in sums:
            gram_kernel.symmetrize(total.mul_(self._scale))
        first, last = zip(sums, seen, strict=True)
        return {role: last if role == "down_proj" else first for role in experts.roles}

    def _given(self, rows: Tensor, scales: Tensor) -> Tensor:
        """What an expert is given of some tokens."""
        x = self._routed.inputs[rows].to(self._device)
        return x * scales.to(self._device)[:, None] if self._experts.scales_inputs else x

    def _chunks(self) -> Iterator[Tensor]:
        """All tokens, as they come to the layer's experts."""
        for chunk in torch.split(self._routed.inputs, CHUNK):
            yield chunk.to(self._device)

    @torch.no_grad()
    def _gram_of_all(self) -> Tensor:
        total = self._zeros(self._experts.width)
        for chunk in self._chunks():
            gram_kernel.accumulate(total, chunk)
        return total

    def _inside_of_all(self, expert: Expert, index: int) -> Tensor:
        total = self._zeros(self._experts.inner)
        for chunk in self._chunks():
            gram_kernel.accumulate(total, self._experts.between(chunk, expert, index))
        return total

    def _shrink(self, own: Tensor, shared: Tensor | None, tokens: int) -> Seen:
        """Mix the Gram of all tokens into an expert's own, where that is of too few; both are upper triangles."""
        needed = needed_tokens(len(self._routed), len(own))
        if shared is None or tokens >= needed:
            return Seen(tokens)
        share = 1 - tokens / needed
        traces = [float(each.diagonal().double().sum()) for each in (own, shared)]
        if not math.isfinite(traces[1]) or traces[1] == 0:  # of tokens that never come to this expert
            return Seen(tokens)
        like = traces[0] / traces[1] if tokens else 1 / len(self._routed)
        own.mul_(1 - share).add_(shared, alpha=share * like)
        return Seen(tokens, share)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, size, dtype=torch.float32, device=self._device)

    @contextmanager
    def _turn(self, index: int) -> Iterator[Callable[[], None]]:
        """Gives what waits until all experts before this one have added what they give: sums keep one order."""

        def wait() -> None:
            with self._changed:
                self._changed.wait_for(lambda: self._failed < index or self._next == index)
                if self._failed < index:
                    raise RunError("an earlier expert failed")  # whose error is the one that is raised

        try:
            yield wait
        except BaseException:
            with self._changed:
                self._failed = min(self._failed, index)
                self._changed.notify_all()
            raise
        with self._changed:
            self._next = index + 1
            self._changed.notify_all()

    def _refuse_not_finite(self, index: int, total: Tensor, states: Tensor, rows: Tensor) -> None:
        if total.diagonal().isfinite().all():
            return
        norms = states.float().square().sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        sample = int(self._routed.samples[rows[int(norms.argmax())]])
        raise not_finite(f"{self._experts.path}.{index}", f"sample {sample}")
