"""Adding up the Grams of a decoder layer's linears while batches run through it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from safeshard.kernels.calibrated import gram as gram_kernel
from safeshard.manifests.errors import RunError
from safeshard.streamer.calibration.model.batches import Batch

_REMEDY = "calibration takes no such model"


class GramCollector:
    """Adds up the Grams of one layer's linears while it runs, one for each distinct input; a context manager.

    Batches may run at once, each in a thread of its own; they are added in order, so that the sums do not depend on it.

    Linears share an input where they are given the same memory at the same version; the first of them to run leads the
    group, whose members must not change from batch to batch. What a linear is given the second time it runs in a batch
    is added up apart, so that batches side by side stay in order, and joined at the end.
    """

    def __init__(self, linears: dict[str, nn.Module], batches: list[Batch]) -> None:
        self._linears = linears
        self._scale = 2 / sum(len(batch.samples) for batch in batches)
        self._leader: dict[str, str] = {}  # module path -> that of its group's leader
        self._again: dict[str, set[str]] = {}  # module path -> what its further runs in a batch are called
        self._grams: dict[str, torch.Tensor] = {}  # by leader
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._batches = batches
        self._finite: list[tuple[str, int, torch.Tensor]] = []  # on a device: leader, batch, whether its Gram is finite
        self._turns: dict[str, int] = {}  # by leader: the batch that is added next
        self._failed = len(batches)  # the first batch that failed
        self._changed = threading.Condition()
        self._running = threading.local()  # the batch that a thread runs, and what it has seen

    def __enter__(self) -> GramCollector:
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
            for name, module in self._linears.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """Inside, this thread runs a batch, once those before it have begun."""
        self._running.number = number
        # Input -> (leader, input). The inputs are kept, so that no other of the same run can come to lie where they do.
        self._running.seen = {}
        self._running.runs = Counter()
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = min(self._failed, number)
                self._changed.notify_all()
            raise
        finally:
            self._running.seen = {}

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Inside, the Gram of `name` holds exactly the batches before this thread's."""
        number = self._running.number
        with self._changed:
            self._changed.wait_for(lambda: self._failed < number or self._turns.get(name, 0) == number)
            if self._failed < number:
                raise RunError("an earlier batch failed")  # whose error is the one that is raised
        yield
        with self._changed:
            self._turns[name] = number + 1
            self._changed.notify_all()

    def finish(self) -> dict[str, torch.Tensor]:
        """Module path -> its Gram, (2 / N) X^T X, symmetric. The collector forgets them.

        Raises:
            RunError: a linear did not run.
        """
        idle = [name for name in self._linears if name not in self._leader]
        if idle:
            raise RunError(f"{', '.join(idle)} took no part in the forward pass", _REMEDY)
        self._refuse_not_finite()
        for gram in self._grams.values():
            gram_kernel.symmetrize(gram.mul_(self._scale))
        grams, self._grams = self._grams, {}
        made = {name: grams[self._leader[name]] for name in self._linears}
        for name, further in self._again.items():
            made[name] = sum((grams[self._leader[run]] for run in sorted(further)), made[name])
        return made

    def _add(self, name: str, x: torch.Tensor) -> None:
        self._running.runs[name] += 1
        if (run := self._running.runs[name]) > 1:
            module, name = name, f"{name} (run {run})"
            with self._changed:
                self._again.setdefault(module, set()).add(name)
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        leader, _ = self._running.seen.setdefault(key, (name, x))
        if self._leader.setdefault(name, leader) != leader:
            raise RunError(f"{name}: which linears share its input changes from batch to batch")
        if leader != name:
            return
        x, batch = x.reshape(-1, x.shape[-1]), self._batches[self._running.number]
        positions = batch.tokens.numel()
        if len(x) != positions:
            raise RunError(f"{name}: {len(x)} rows of input for {positions} tokens", _REMEDY)
        rows = x if len(batch.rows) == positions else x[batch.rows.to(x.device)]
        with self._turn(name):
            if name not in self._grams:
                self._grams[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            gram_kernel.accumulate(self._grams[name], rows)
            self._check_finite(name, rows, batch)

    def _check_finite(self, name: str, rows: torch.Tensor, batch: Batch) -> None:
        # By Cauchy-Schwarz no entry is larger than the largest of the diagonal, and a NaN input reaches the diagonal.
        finite = self._grams[name].diagonal().isfinite().all()
        if finite.is_cuda:  # looked at once a layer: nothing waits for a device here
            self._finite.append((name, self._running.number, finite))
            return
        if finite:
            return
        norms = rows.float().square().sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        place = int(batch.rows[int(norms.argmax())])
        sample = batch.samples[place // batch.tokens.shape[1]]
        raise not_finite(name, f"sample {sample}")

    def _refuse_not_finite(self) -> None:
        """Name the first batch from which on a device's Gram was not finite."""
        flags = torch.stack([finite for *_, finite in self._finite]).tolist() if self._finite else []
        bad = [(number, name) for (name, number, _), finite in zip(self._finite, flags, strict=True) if not finite]
        self._finite.clear()
        if bad:
            number, name = min(bad)
            raise not_finite(name, f"samples {', '.join(map(str, self._batches[number].samples))}")


def not_finite(name: str, place: str) -> RunError:
    return RunError(
        f"{name}: the Gram matrix is not finite from calibration {place} (counted from 0) on",
        "look at that sample and at the aligned checkpoint; float16 overflows where bfloat16 and float32 do not",
    )
