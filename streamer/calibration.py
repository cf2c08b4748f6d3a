"""Gram matrices of every decoder linear's inputs, with one decoder layer in memory at a time.

Safe Delta (Lu et al., ICML 2025) calibrates as SparseGPT (arXiv 2301.00774) does: for the inputs X of a linear, one row
a token of the calibration data, H = (2 / N) X^T X with N the number of samples. Prompt and answer tokens count alike,
padding does not count. The factor 2 / N matters only for inputs that are always zero: the published code sets their
diagonal entry to 1, whatever the scale of the others.

Data flow, in one direction: token ids -> padded batches -> hidden states and recorded arguments (`Skeleton.record`)
-> layer by layer: weights in, every batch through, Grams out, weights dropped. Between layers the hidden states may be
saved (`HiddenStates`), and an interrupted run goes on from those.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from safeshard.kernels import gram as gram_kernel
from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.streamer.hidden_states import SPILL, HiddenStates
from safeshard.streamer.skeleton import LayerCall, Load, Skeleton

_REMEDY = "Safe Delta does not take this model"


@dataclass(frozen=True)
class LayerGrams:
    """The Grams of one decoder layer.

    Linears that share their input (q/k/v, gate/up) share one tensor. Whoever receives this drops it (`grams.clear()`)
    before asking for the next layer, or two layers' Grams are held at once.
    """

    index: int
    prefix: str  # module path of the layer: model.layers.3
    grams: dict[str, torch.Tensor]  # module path -> I x I fp32, symmetric, on the device of the forward pass
    tokens: int  # rows of X


@dataclass(frozen=True)
class Batch:
    """Samples run together, padded on the right to the longest.

    `samples` are their places in the calibration data; `tokens` and `mask` are len(samples) x length, `rows` are the
    places of the tokens that are not padding once both are flattened; all int64.
    """

    samples: list[int]
    tokens: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor


def calibrate(
    config_folder: Path,
    load: Load,
    names: Collection[str],
    tokens: Sequence[Sequence[int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_tokens: int = 4096,
    budget_bytes: int,
    key: str,
    saved: HiddenStates,
) -> Iterator[LayerGrams]:
    """Run an aligned model over calibration samples, layer by layer, and yield the Grams of each from `saved.first` on.

    The request is checked at the call; the work happens while iterating.

    Args:
        config_folder: local folder with the model's config.json.
        load: gives a tensor of the checkpoint by its name; called once a tensor, in the order of the modules.
        names: every tensor name of the checkpoint.
        tokens: token ids of each sample, none of them empty.
        device, dtype: of the forward pass. Grams are fp32 on the same device.
        batch_tokens: padded tokens a batch holds at most; a longer sample is a batch of its own. The batches, hence the
            last bits of a Gram, depend on this and on `tokens` alone, never on `budget_bytes`.
        budget_bytes: host bytes for the hidden states (all padded tokens x hidden size, in `dtype`); beyond that they
            lie in a file without a name in the first of `saved.folders`.
        key: hash of all that the hidden states depend on.
        saved: where they are saved between layers, once the consumer is through with a layer's Grams.

    Raises:
        RequestError: at the call, as `Skeleton` does, and for empty or too long samples.
        RunError: while iterating, for a non-finite Gram (module and sample named), or a linear that does not run.
    """
    skeleton = Skeleton(config_folder, names, dtype)
    check_lengths(config_folder, tokens, skeleton.max_positions)
    batches = _batches(tokens, batch_tokens)
    buffer = partial(_host_buffer, dtype=dtype, budget_bytes=budget_bytes, folder=saved.folders[0])
    return _run(skeleton, load, batches, device, buffer, key, saved)


@torch.no_grad()
def _run(
    skeleton: Skeleton,
    load: Load,
    batches: list[Batch],
    device: torch.device,
    allocate: Callable[[int], torch.Tensor],
    key: str,
    saved: HiddenStates,
) -> Iterator[LayerGrams]:
    with _one_thread():
        buffer, hidden, calls = _embed(skeleton, load, batches, device, allocate)
    start = saved.load(key, buffer)
    for index, path in list(enumerate(skeleton.layers))[start:]:
        if index > start:
            saved.save(key, index, buffer)
        wanted = index >= saved.first
        collector = GramCollector(skeleton.linears(path) if wanted else {}, batches)
        with _one_thread(), skeleton.filled(path, load, device), collector:
            for batch, states, batch_calls in zip(batches, hidden, calls, strict=True):
                collector.start(batch)
                states.copy_(batch_calls[index].run(skeleton.layers[path], states.to(device)))
        if wanted:
            yield LayerGrams(index, path, collector.finish(), sum(len(batch.rows) for batch in batches))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread of the CPU: how it cuts work into pieces changes the last bits of a Gram."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _embed(
    skeleton: Skeleton,
    load: Load,
    batches: list[Batch],
    device: torch.device,
    allocate: Callable[[int], torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor], list[list[LayerCall]]]:
    """The first hidden states: flat on the host, and each batch's view of them (batch x length x hidden size); and each
    batch's arguments of the layers (on the device: masks and position embeddings, which the layers mostly share)."""
    hidden: list[torch.Tensor] = []
    calls: list[list[LayerCall]] = []
    buffer = torch.empty(0)
    with skeleton.filled(None, load, device):
        for batch in batches:
            states, batch_calls = skeleton.record(batch.tokens.to(device), batch.mask.to(device))
            if not hidden:
                buffer = allocate(sum(b.tokens.numel() for b in batches) * states.shape[-1])
            used = sum(view.numel() for view in hidden)
            hidden.append(buffer[used : used + states.numel()].view(states.shape))
            hidden[-1].copy_(states)
            calls.append(batch_calls)
    return buffer, hidden, calls


class GramCollector:
    """Adds up the Grams of one layer's linears while it runs, one for each distinct input; a context manager.

    Linears share an input where they are given the same memory at the same version; the first of them to run leads the
    group, whose members must not change from batch to batch.
    """

    def __init__(self, linears: dict[str, nn.Module], batches: list[Batch]) -> None:
        self._linears = linears
        self._scale = 2 / sum(len(batch.samples) for batch in batches)
        self._leader: dict[str, str] = {}  # module path -> that of its group's leader
        self._grams: dict[str, torch.Tensor] = {}  # by leader
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._batch = batches[0]
        # Input -> (leader, input). The inputs are kept, so that no other of the same run can come to lie where they do.
        self._seen: dict[tuple[object, ...], tuple[str, torch.Tensor]] = {}

    def __enter__(self) -> GramCollector:
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
            for name, module in self._linears.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def start(self, batch: Batch) -> None:
        """Begin a batch: what was seen so far belongs to another run of the layer."""
        self._batch = batch
        self._seen.clear()

    def finish(self) -> dict[str, torch.Tensor]:
        """Module path -> its Gram, (2 / N) X^T X, symmetric. The collector forgets them.

        Raises:
            RunError: a linear did not run.
        """
        idle = [name for name in self._linears if name not in self._leader]
        if idle:
            raise RunError(f"{', '.join(idle)} took no part in the forward pass", _REMEDY)
        for gram in self._grams.values():
            gram_kernel.symmetrize(gram.mul_(self._scale))
        grams, self._grams = self._grams, {}
        return {name: grams[self._leader[name]] for name in self._linears}

    def _add(self, name: str, x: torch.Tensor) -> None:
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        leader, _ = self._seen.setdefault(key, (name, x))
        if self._leader.setdefault(name, leader) != leader:
            raise RunError(f"{name}: which linears share its input changes from batch to batch")
        if leader != name:
            return
        x = x.reshape(-1, x.shape[-1])
        positions = self._batch.tokens.numel()
        if len(x) != positions:
            raise RunError(f"{name}: {len(x)} rows of input for {positions} tokens", _REMEDY)
        rows = x if len(self._batch.rows) == positions else x[self._batch.rows.to(x.device)]
        if name not in self._grams:
            self._grams[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        gram_kernel.accumulate(self._grams[name], rows)
        self._check_finite(name, rows)

    def _check_finite(self, name: str, rows: torch.Tensor) -> None:
        # By Cauchy-Schwarz no entry is larger than the largest of the diagonal, and a NaN input reaches the diagonal.
        if self._grams[name].diagonal().isfinite().all():
            return
        norms = rows.float().square().sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        place = int(self._batch.rows[int(norms.argmax())])
        sample = self._batch.samples[place // self._batch.tokens.shape[1]]
        raise RunError(
            f"{name}: the Gram matrix is not finite from calibration sample {sample} (counted from 0) on",
            "look at that sample and at the aligned checkpoint; float16 overflows where bfloat16 and float32 do not",
        )


def check_lengths(folder: Path, tokens: Sequence[Sequence[int]], longest: int | None) -> None:
    """RequestError for no samples, empty ones, or one of more tokens than the model takes (`longest`)."""
    if not tokens or not all(tokens):
        raise RequestError(Offence("calibration data", expected="samples of at least one token", got="none"))
    if longest is not None and (got := max(map(len, tokens))) > longest:
        where, key = str(folder / "config.json"), "max_position_embeddings"
        raise RequestError(Offence(where, key, f"{got} or more", str(longest), "lower --max-tokens"))


def _batches(tokens: Sequence[Sequence[int]], batch_tokens: int) -> list[Batch]:
    """Samples in order of length, so that little padding is run, cut where a batch would exceed `batch_tokens`."""
    groups: list[list[int]] = []
    for sample in sorted(range(len(tokens)), key=lambda sample: len(tokens[sample])):
        if groups and (len(groups[-1]) + 1) * len(tokens[sample]) <= batch_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [_pad(group, [tokens[sample] for sample in group]) for group in groups]


def _pad(samples: list[int], tokens: list[Sequence[int]]) -> Batch:
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(tokens):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return Batch(samples, ids, mask, mask.flatten().nonzero().flatten())


def _host_buffer(numel: int, dtype: torch.dtype, budget_bytes: int, folder: Path) -> torch.Tensor:
    """A flat host tensor, in memory where it fits the budget, else mapped from a file that vanishes with it."""
    nbytes = numel * dtype.itemsize
    if nbytes <= budget_bytes:
        return torch.empty(numel, dtype=dtype)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=SPILL[0], suffix=SPILL[1]) as file:
            if sys.platform == "linux":  # reserve it now: a full disk would otherwise kill the process at some write
                os.posix_fallocate(file.fileno(), 0, nbytes)
            # The mapping outlives the name, so nothing is left behind however the process ends.
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        remedy = "free disk space, raise --memory, or take fewer samples"
        raise RunError(f"no room for {nbytes} bytes of hidden states in {folder}: {error}", remedy) from error
