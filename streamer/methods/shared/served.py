"""Adapters written for who serves them: a scaling of 1 and one rank; or merged into the weights they stand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safeshard import kernels
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.methods.base import Edit, Job, Lora, Module

if TYPE_CHECKING:  # nobody waits for torch to read a method's options
    from torch import Tensor


def unit_scaling_config(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The adapter's config with the given ranks and a scaling of 1 for every module."""
    common = max(ranks.values())
    pattern = {name: rank for name, rank in sorted(ranks.items()) if rank != common}
    return adapter.config.raw | {
        "r": common, "lora_alpha": common, "use_rslora": False, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
    }  # fmt: skip


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zero rows of A and columns of B up to `rank`; the product stays the same."""
    from torch.nn.functional import pad

    extra = rank - a.shape[0]
    return pad(a, (0, 0, 0, extra)), pad(b, (0, extra))


def _written_pair(edit: Edit, old: Lora, job: Job) -> tuple[Tensor, Tensor]:
    """The pair that an edit gives, in fp32 for a scaling of 1."""
    given = edit.tensors.get("a", old.a), edit.tensors.get("b", old.b)
    a, b = (x.formed() if isinstance(x, kernels.merge.Sum) else x for x in given)
    assert not isinstance(a, Iterator)
    assert not isinstance(b, Iterator)
    return a.float(), b.float() * (1.0 if job.rescales else old.scaling)


def served(edit: Edit, old: Lora, job: Job, rank: int) -> Edit:
    """An edit of a pair for a scaling of 1 at a given rank: truncated to the job's `rank`, then padded with zeros."""
    a, b = _written_pair(edit, old, job)
    fields = {**edit.fields, "rank": rank}
    limit = getattr(job, "rank", None) or rank
    if len(a) > limit:
        a, b, lost = kernels.ranks.truncate(a, b, limit)
        fields["lost_fraction"] = float(lost)
    a, b = pad_rank(a, b, rank)
    return replace(edit, tensors={"a": a, "b": b}, fields=fields)


def merged(edit: Edit, module: Module, job: Job) -> Edit:
    """An edit of a pair as the weight that it makes of the aligned one, in row tiles."""
    aligned, old = module.aligned, module.finetuned
    assert aligned is not None
    assert isinstance(old, Lora)
    a, b = _written_pair(edit, old, job)
    dtype = job.dense_dtype(aligned)
    tiles = ((aligned[rows].float() + b[rows] @ a).to(dtype) for rows in kernels.dense.tiles(len(aligned)))
    return replace(edit, tensors={"weight": tiles}, fields={k: v for k, v in edit.fields.items() if k != "rank"})
