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

import tempfile
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeshard.kernels.backend import upload
from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.streamer.calibration.ahead import Ahead, Load
from safeshard.streamer.calibration.gram_collector import Batch, GramCollector
from safeshard.streamer.calibration.hidden_states import SPILL, HiddenStates
from safeshard.streamer.calibration.skeleton import LayerCall, Skeleton
from safeshard.streamer.device import memory_errors, own_stream, wait
from safeshard.streamer.disk import reserve
from safeshard.streamer.pinned import host_memory


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
    workers: int = 1,
    ahead_bytes: int = 0,
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
        workers: batches run at once, each on one thread of the CPU. They change no bit: a Gram takes them in order.
        ahead_bytes: host bytes, pinned, for the weights of a layer, read while a device computes the one before.

    Raises:
        RequestError: at the call, as `Skeleton` does, and for empty or too long samples.
        RunError: while iterating, for a non-finite Gram (module and sample named), a linear that does not run, or too
            little memory on the device.
    """
    skeleton = Skeleton(config_folder, names, dtype)
    check_lengths(config_folder, tokens, skeleton.max_positions)
    batches = _batches(tokens, batch_tokens)
    pinned = device.type == "cuda"
    buffer = partial(_host_buffer, dtype=dtype, budget_bytes=budget_bytes, folder=saved.folders[0], pinned=pinned)
    if pinned:
        return _run_on_device(skeleton, load, batches, device, buffer, key, saved, ahead_bytes)
    return _run(skeleton, load, batches, device, buffer, key, saved, workers)


@torch.no_grad()
def _run_on_device(
    skeleton: Skeleton,
    load: Load,
    batches: list[Batch],
    device: torch.device,
    allocate: Callable[[int], torch.Tensor],
    key: str,
    saved: HiddenStates,
    ahead_bytes: int,
) -> Iterator[LayerGrams]:
    """As `_run`, batch after batch on one stream.

    Meanwhile the next layer's weights are read, and the next batch's states copied. The host waits until a layer's
    weights are there, and until it is done.
    """
    remedy = "use a device with more memory, fewer --max-tokens, or --device cpu; the same command resumes"
    with own_stream(device), memory_errors("embeddings", remedy):
        buffer, hidden, calls = _embed(skeleton, load, batches, device, allocate)
        batches = [replace(batch, rows=upload(batch.rows, device)) for batch in batches]
        wait(device)
    start, shared = saved.load(key, buffer), _shared(calls)
    left = list(enumerate(skeleton.layers))[start:]
    ahead = Ahead(load, ahead_bytes)
    with ahead.reading():
        for (index, path), following in zip(left, [*left[1:], None], strict=True):
            if index > start and not any(shared):
                saved.save(key, index, buffer)
            wanted = index >= saved.first
            collector = GramCollector(skeleton.linears(path) if wanted else {}, batches)
            with own_stream(device), memory_errors(path, remedy):
                with skeleton.filled(path, ahead, device), collector:
                    wait(device)
                    ahead.announce(skeleton.stored(following[1]) if following else ())
                    arriving = zip(hidden, _arriving(hidden, device), calls, strict=True)
                    for number, (states, arrived, batch_calls) in enumerate(arriving):
                        with collector.batch(number):
                            states.copy_(batch_calls[index].run(skeleton.layers[path], arrived), non_blocking=True)
                    wait(device)  # before the weights go, and before another stream takes the Grams
                grams = collector.finish()
                wait(device)
            if wanted:
                yield LayerGrams(index, path, grams, sum(len(batch.rows) for batch in batches))
                del grams


def _arriving(hidden: Sequence[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Each batch's hidden states on the device; those of the next are copied while one is computed."""
    computing = torch.cuda.current_stream(device)
    with own_stream(device):
        copying = torch.cuda.current_stream(device)
    coming: list[tuple[torch.Tensor, torch.cuda.Event]] = []
    for states in [*hidden, None]:
        if states is not None:
            with torch.cuda.stream(copying):
                arrived = states.to(device, non_blocking=True)
                arrived.record_stream(computing)
                coming.append((arrived, copying.record_event()))
        if states is None or len(coming) == 2:
            arrived, event = coming.pop(0)
            computing.wait_event(event)
            yield arrived


@torch.no_grad()
def _run(
    skeleton: Skeleton,
    load: Load,
    batches: list[Batch],
    device: torch.device,
    allocate: Callable[[int], torch.Tensor],
    key: str,
    saved: HiddenStates,
    workers: int,
) -> Iterator[LayerGrams]:
    with _one_thread():
        buffer, hidden, calls = _embed(skeleton, load, batches, device, allocate)
    start, shared = saved.load(key, buffer), _shared(calls)
    for index, path in list(enumerate(skeleton.layers))[start:]:
        if index > start and not any(shared):
            saved.save(key, index, buffer)
        wanted = index >= saved.first
        collector = GramCollector(skeleton.linears(path) if wanted else {}, batches)
        with _one_thread(), skeleton.filled(path, load, device), collector:
            run = partial(_run_batch, skeleton.layers[path], collector)
            with ThreadPoolExecutor(workers, "batch", initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for _ in pool.map(run, range(len(batches)), hidden, [batch_calls[index] for batch_calls in calls]):
                    pass
        if wanted:
            grams = collector.finish()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # whoever takes the Grams works on a stream of its own
            yield LayerGrams(index, path, grams, sum(len(batch.rows) for batch in batches))


@torch.no_grad()  # which holds for a thread alone
def _run_batch(layer: nn.Module, collector: GramCollector, number: int, states: torch.Tensor, call: LayerCall) -> None:
    """Replace a batch's hidden states by those after `layer`, which computes where its weights lie."""
    device = next(layer.parameters()).device
    with collector.batch(number):
        states.copy_(call.run(layer, states.to(device)))


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
    batch's arguments of the layers (on the device: masks and position embeddings, which they mostly share)."""
    hidden: list[torch.Tensor] = []
    calls: list[list[LayerCall]] = []
    buffer = torch.empty(0)
    with skeleton.filled(None, load, device):
        for batch in batches:
            states, batch_calls = skeleton.record(batch.tokens.to(device), batch.mask.to(device))
            if not hidden:
                width = states.numel() // batch.tokens.numel()
                buffer = allocate(sum(b.tokens.numel() for b in batches) * width)
            used = sum(view.numel() for view in hidden)
            hidden.append(buffer[used : used + states.numel()].view(states.shape))
            hidden[-1].copy_(states, non_blocking=True)
            calls.append(batch_calls)
    return buffer, hidden, calls


def _shared(calls: list[list[LayerCall]]) -> list[MutableMapping[Any, Any]]:
    """What layers fill for later ones, still empty: keys and values that they share.

    It is not saved with the hidden states; from the layer on that fills it, an interrupted run has to begin before.
    """
    given = [value for call, *_ in calls for value in (*call.args, *call.kwargs.values())]
    return [value for value in given if isinstance(value, MutableMapping) and not value]


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


def _host_buffer(numel: int, dtype: torch.dtype, budget_bytes: int, folder: Path, pinned: bool = False) -> torch.Tensor:
    """A flat host tensor, in memory where it fits the budget, else mapped from a file that vanishes with it."""
    nbytes = numel * dtype.itemsize
    if nbytes <= budget_bytes:
        return host_memory(nbytes, pinned=pinned).view(dtype) if pinned else torch.empty(numel, dtype=dtype)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=SPILL[0], suffix=SPILL[1]) as file:
            reserve(file.fileno(), nbytes)  # now: a full disk would otherwise kill the process at some write
            # The mapping outlives the name, so nothing is left behind however the process ends.
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        remedy = "free disk space, raise --memory, or take fewer samples"
        raise RunError(f"no room for {nbytes} bytes of hidden states in {folder}: {error}", remedy) from error
