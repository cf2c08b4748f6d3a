"""Gram matrices of every decoder linear's inputs, with one decoder layer in memory at a time.

Safe Delta (Lu et al., ICML 2025) calibrates as SparseGPT (arXiv 2301.00774) does: for the inputs X of a linear, one row
a token of the calibration data, H = (2 / N) X^T X with N the number of samples. Prompt and answer tokens count alike,
padding does not count. The factor 2 / N matters only for inputs that are always zero: the published code sets their
diagonal entry to 1, whatever the scale of the others.

Data flow, in one direction: token ids -> padded batches -> hidden states and recorded arguments (`Skeleton.record`)
-> layer by layer: weights in, every batch through, Grams out, weights dropped. A layer with experts runs up to these,
then each expert once for all batches (`ExpertGrams`), then once more as a whole. Between layers the hidden states may
be saved (`HiddenStates`), and an interrupted run goes on from those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeshard.kernels.backend import upload
from safeshard.streamer.calibration.expert_grams import Seen
from safeshard.streamer.calibration.expert_stage import BUFFERS, ExpertStage
from safeshard.streamer.calibration.gram_collector import GramCollector
from safeshard.streamer.calibration.hidden_states import HiddenStates
from safeshard.streamer.calibration.model.ahead import Ahead, Load
from safeshard.streamer.calibration.model.batches import Batch, check_lengths, cut, host_buffer
from safeshard.streamer.calibration.model.experts import Experts
from safeshard.streamer.calibration.model.running import (
    arriving,
    computing,
    filled_on_device,
    one_by_one,
    one_thread,
    side_by_side,
)
from safeshard.streamer.calibration.model.skeleton import LayerCall, Skeleton
from safeshard.streamer.calibration.model.weights import Weights
from safeshard.streamer.device import memory_errors, own_stream, wait


@dataclass(frozen=True)
class LayerGrams:
    """The Grams of one decoder layer, or of some of its experts, which come before its other linears.

    Linears that share their input (q/k/v, gate/up) share one tensor. Whoever receives this drops it (`grams.clear()`)
    before asking for the next layer, or two layers' Grams are held at once.
    """

    index: int
    prefix: str  # module path of the layer: model.layers.3
    grams: dict[str, torch.Tensor]  # module path -> I x I fp32, symmetric, on the device of the forward pass
    tokens: int  # rows of X, but for experts
    seen: Mapping[str, Seen] = field(default_factory=dict)  # expert's linear -> how many tokens came to it


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
    experts: Weights | None = None,
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
        experts: gives the weights of experts; a model without any needs none.

    Raises:
        RequestError: at the call, as `Skeleton` does, and for empty or too long samples.
        RunError: while iterating, for a non-finite Gram (module and sample named), a linear that does not run, or too
            little memory on the device.
    """
    skeleton = Skeleton(config_folder, names, dtype)
    check_lengths(config_folder, tokens, skeleton.max_positions)
    batches = cut(tokens, batch_tokens)
    pinned = device.type == "cuda"
    budget_bytes //= BUFFERS if skeleton.experts else 1
    buffer = partial(host_buffer, dtype=dtype, budget_bytes=budget_bytes, folder=saved.folders[0], pinned=pinned)
    stage = ExpertStage(experts, batches, buffer, device, dtype, workers) if experts and skeleton.experts else None
    if pinned:
        return _run_on_device(skeleton, load, batches, device, buffer, key, saved, ahead_bytes, stage)
    return _run(skeleton, load, batches, device, buffer, key, saved, workers, stage)


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
    stage: ExpertStage | None,
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
    rows = sum(len(batch.rows) for batch in batches)
    start, shared = saved.load(key, buffer), _shared(calls)
    left = list(enumerate(skeleton.layers))[start:]
    ahead = Ahead(load, ahead_bytes)
    with ahead.reading():
        for (index, path), following in zip(left, [*left[1:], None], strict=True):
            if index > start and not any(shared):
                saved.save(key, index, buffer)
            wanted = index >= saved.first
            layer, given = skeleton.layers[path], [batch_calls[index] for batch_calls in calls]
            collector = GramCollector(skeleton.linears(path) if wanted else {}, batches)
            with filled_on_device(skeleton, path, ahead, device, remedy):
                experts = skeleton.experts.get(path)
                if stage is not None and experts is not None:

                    def alone(number: int, layer: nn.Module = layer, given: list[LayerCall] = given) -> None:
                        given[number].run(layer, hidden[number].to(device))

                    inside = partial(computing, device, path, remedy)
                    for portion in stage.portions(experts, alone, one_by_one, inside, wanted):
                        yield LayerGrams(index, path, portion.grams, rows, portion.seen)
                with computing(device, path, remedy), collector, _replaying(stage, experts) as tell:
                    ahead.announce(skeleton.stored(following[1]) if following else ())
                    for number, (states, arrived) in enumerate(zip(hidden, arriving(hidden, device), strict=True)):
                        tell(number)
                        with collector.batch(number):
                            states.copy_(given[number].run(layer, arrived), non_blocking=True)
                    wait(device)  # before the weights go, and before another stream takes the Grams
            with computing(device, path, remedy):
                grams = collector.finish()
                wait(device)
            if wanted:
                yield LayerGrams(index, path, grams, rows)
                del grams


@contextmanager
def _replaying(stage: ExpertStage | None, experts: Experts | None) -> Iterator[Callable[[int], None]]:
    """Inside, the experts of a layer, if it has any, give what they gave; what is given is told each batch's number."""
    if stage is None or experts is None:
        yield lambda number: None
        return
    with stage.replaying(experts) as tell:
        yield tell


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
    stage: ExpertStage | None,
) -> Iterator[LayerGrams]:
    rows = sum(len(batch.rows) for batch in batches)
    with one_thread():
        buffer, hidden, calls = _embed(skeleton, load, batches, device, allocate)
    start, shared = saved.load(key, buffer), _shared(calls)
    for index, path in list(enumerate(skeleton.layers))[start:]:
        if index > start and not any(shared):
            saved.save(key, index, buffer)
        wanted = index >= saved.first
        layer, given = skeleton.layers[path], [batch_calls[index] for batch_calls in calls]
        collector = GramCollector(skeleton.linears(path) if wanted else {}, batches)
        with skeleton.filled(path, load, device):
            experts = skeleton.experts.get(path)
            each = partial(side_by_side, workers)
            if stage is not None and experts is not None:
                alone = partial(_run_alone, layer, given, hidden)
                for portion in stage.portions(experts, alone, each, one_thread, wanted):
                    yield LayerGrams(index, path, portion.grams, rows, portion.seen)
            with one_thread(), collector, _replaying(stage, experts) as tell:
                each(partial(_run_batch, layer, collector, tell, given, hidden), range(len(batches)))
        if wanted:
            grams = collector.finish()
            yield LayerGrams(index, path, grams, rows)


@torch.no_grad()  # which holds for a thread alone
def _run_alone(layer: nn.Module, given: list[LayerCall], hidden: list[torch.Tensor], number: int) -> torch.Tensor:
    """The hidden states of a batch after `layer`, which computes where its weights lie."""
    return given[number].run(layer, hidden[number])


@torch.no_grad()
def _run_batch(
    layer: nn.Module,
    collector: GramCollector,
    tell: Callable[[int], None],
    given: list[LayerCall],
    hidden: list[torch.Tensor],
    number: int,
) -> None:
    """Replace a batch's hidden states by those after `layer`."""
    tell(number)
    with collector.batch(number):
        hidden[number].copy_(given[number].run(layer, hidden[number]))


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
