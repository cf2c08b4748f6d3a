"""What a step gives to its writer: new tensors, measured on their way, encoded again where they are quantised."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safeshard.kernels.effect import Pair as WrittenPair
from safeshard.kernels.effect import Products
from safeshard.kernels.tally import Tally
from safeshard.streamer.clock import Clock
from safeshard.streamer.device import Arrivals
from safeshard.streamer.inputs.codecs.base import Encoded
from safeshard.streamer.inputs.layouts import Part
from safeshard.streamer.inputs.read import TORCH_DTYPES, Read
from safeshard.streamer.methods.base import Lora, Module
from safeshard.streamer.plan.job_plan import ModulePlan, Pair, Weight
from safeshard.streamer.run.flow.effects import measured_tiles, written_pair
from safeshard.streamer.run.flow.on_device import Inputs
from safeshard.streamer.run.flow.tasks import ModuleTask
from safeshard.streamer.write.finite import NotFiniteError


@contextmanager
def _writing(task: ModuleTask, inputs: Inputs, clock: Clock) -> Iterator[None]:
    """Inside, what is not finite is traced back to the inputs, and the time is that of writing."""
    start = time.perf_counter()
    try:
        yield
    except NotFiniteError:
        inputs.refuse_not_finite(task.reads())
        raise
    clock.add("write", start)


def write_module(
    task: ModuleTask,
    module: Module,
    tensors: Mapping[str, Tensor | Iterator[Tensor]],
    inputs: Inputs,
    clock: Clock,
    arrivals: Arrivals,
    encoded: list[Encoded],
) -> WrittenPair | Products:
    """Write a module's new tensors; what tells what they leave of its delta. `encoded` gets what was encoded."""
    writer, plan = task.run.writer, task.plan
    assert writer is not None

    def timed(action: Callable[..., None], *args: Any) -> None:
        with _writing(task, inputs, clock):
            action(*args)

    def write(what: str, tensor: Tensor | Iterator[Tensor]) -> None:
        assert writer is not None
        stored = plan.writes[what]
        if not stored.is_tensor:
            known = partial(known_parts, plan, load=inputs.tensor)
            with _writing(task, inputs, clock) if inputs.on_device else nullcontext():
                encoded.extend(task.run.assembler.write(plan.name, what, stored, tensor, known))
            return
        if stored.transposed:
            tensor = (tensor if isinstance(tensor, Tensor) else torch.cat(list(tensor))).T
        if not inputs.on_device:
            writer.write(stored.name, tensor)
            return
        under_way = writer.begin(stored.name)
        for piece in [tensor] if isinstance(tensor, Tensor) else tensor:
            arrivals.add(piece, TORCH_DTYPES[under_way.dtype], partial(timed, under_way.add_tensor))
        arrivals.then(partial(timed, under_way.finish))

    with nullcontext() if inputs.on_device else _writing(task, inputs, clock):
        if "weight" in plan.writes:
            return _write_weight(task, module, tensors["weight"], write)
        new = {part: tensor for part in plan.writes if isinstance(tensor := tensors[part], Tensor)}
        for part, tensor in new.items():
            write(part, tensor)
        old, pair = module.finetuned, plan.finetuned
        assert isinstance(old, Lora)
        assert isinstance(pair, Pair)
        dtypes = {part: writer.place(ref.name).dtype for part, ref in (("a", pair.lora.a), ("b", pair.lora.b))}
        return written_pair(old, new, 1.0 if task.run.job.writes_unit_scaling else old.scaling, dtypes)


def _write_weight(
    task: ModuleTask,
    module: Module,
    tensor: Tensor | Iterator[Tensor],
    write: Callable[[str, Tensor | Iterator[Tensor]], None],
) -> Products:
    """Write a module's new weight. Where it is stored quantised, its effect is that of the numbers that are coded."""
    writer, stored = task.run.writer, task.plan.writes["weight"]
    assert writer is not None
    assert module.aligned is not None
    dtype = writer.place(next(iter(stored.names))).dtype if all(p.codec is None for p in stored.parts) else "F32"
    every = 4 if task.run.job.gated or isinstance(module.finetuned, Tensor) else 64  # little beside what it takes
    tally = Tally(module.aligned.numel(), every, module.aligned.device)
    if isinstance(tensor, Tensor):
        for _ in measured_tiles(module, [tensor], dtype, tally):
            pass
    else:
        tensor = measured_tiles(module, tensor, dtype, tally)
    write("weight", tensor)
    return tally.products()


def known_parts(plan: ModulePlan, part: Part, load: Callable[[Read], Tensor]) -> list[dict[str, Tensor]]:
    """What the aligned weight has in a region, then the fine-tuned one, where it is of the same format."""
    assert plan.aligned is not None
    number = next(n for n, each in enumerate(plan.aligned.stored.parts) if each.block == part.block)
    found = []
    for place in (plan.aligned, plan.finetuned):
        theirs = place.stored.parts[number : number + 1] if isinstance(place, Weight) else ()
        for each in (each for each in theirs if _form(each) == _form(part)):
            assert isinstance(place, Weight)
            found.append({name: load(Read(place.source, ref)).cpu() for name, ref in each.refs.items()})
    return found


def encoding_fields(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """What a module's entry says of the regions that were encoded."""
    if not encoded:
        return {}
    norm = sum(each.norm for each in encoded)
    error = math.sqrt(sum(each.error for each in encoded) / norm) if norm else 0.0
    blocks, changed = sum(each.blocks for each in encoded), sum(each.changed for each in encoded)
    return {"blocks": blocks, "blocks_changed": changed, "encoding_error": error}


def _form(part: Part) -> Any:
    return part.codec, part.stored, part.view, {name: (ref.dtype, ref.shape) for name, ref in part.refs.items()}
