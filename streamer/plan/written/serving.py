"""Adapters that vLLM reads right: one rank that it takes, a scaling of 1 everywhere, nothing saved whole.

Of adapter_config.json vLLM reads `r`, `lora_alpha`, `target_modules`, `use_rslora`, `use_dora`, `bias` and
`modules_to_save` (vllm/lora/peft_helper.py); patterns of ranks and alphas it passes over. Its `--max-lora-rank`
is one of `RANKS` (vllm/config/lora.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from safeshard.manifests.errors import Offence
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.plan.job_plan import JobPlan

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve_offences(plan: JobPlan) -> Iterator[Offence]:
    """What vLLM could not read of an adapter that is to be served by it."""
    if plan.job.served_by is None:
        return
    adapter = plan.finetuned
    if not isinstance(adapter, Adapter) or plan.job.writes_checkpoint:
        yield Offence("--serve", "", "an adapter as output", "a checkpoint, which needs no --serve", "leave it out")
        return
    where = adapter.source.spec
    remedy = "--output-format checkpoint, in place of --serve, merges it"
    for key in sorted(adapter.saved):
        yield Offence(where, key, "pairs alone, for vLLM", "a tensor that is saved whole", remedy)
    if adapter.config.raw.get("target_parameters"):
        yield Offence(where, "target_parameters", "adapters of modules, for vLLM", "one of parameters", remedy)
    needed = _needed(plan)
    if needed > RANKS[-1]:
        yield Offence("--serve", "", f"a rank of at most {RANKS[-1]}", str(needed), f"add --rank {RANKS[-1]} or lower")


def serve_rank(plan: JobPlan) -> int | None:
    """The rank that every pair is written with; None where nothing is to be served."""
    if plan.job.served_by is None:
        return None
    needed = _needed(plan)
    return next(rank for rank in RANKS if rank >= needed)


def _needed(plan: JobPlan) -> int:
    adapter, safe = plan.finetuned, plan.safe
    assert isinstance(adapter, Adapter)
    if (limit := getattr(plan.job, "rank", None)) is not None:
        return int(limit)
    others = safe.modules if isinstance(safe, Adapter) else {}
    ranks = [rank for name, m in adapter.modules.items() for rank in plan.job.parts(m, others.get(name)).values()]
    return max([*ranks, *(m.rank for m in adapter.modules.values())])
