"""The planner: opens every input by its headers, checks everything, and says what will be read and written.

It reads no weights, with two exceptions: to refuse a fine-tuned model that equals the aligned one (or an aligned one
that equals the unaligned), it compares bytes until the first difference; and to refuse factors of another model, it
hashes a few KiB of some weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.schema import JOURNAL_NAME
from safeshard.streamer.calibration.factor_files import factor_offences, open_factors
from safeshard.streamer.inputs.adapter import Adapter, open_adapter
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.inputs.compare import same_tensors
from safeshard.streamer.inputs.expert_lora import Packing
from safeshard.streamer.inputs.names.apply import in_names_of
from safeshard.streamer.methods.base import Job
from safeshard.streamer.methods.ridge import Ridge
from safeshard.streamer.methods.safedelta import SafeDelta
from safeshard.streamer.plan.cautions import cautions
from safeshard.streamer.plan.checks import input_offences
from safeshard.streamer.plan.identity import finished
from safeshard.streamer.plan.job_plan import JobPlan, Weight
from safeshard.streamer.plan.layout import left_encoded
from safeshard.streamer.plan.outputs import plan_outputs
from safeshard.streamer.plan.places import output_offences
from safeshard.streamer.plan.side_files import plan_side_files
from safeshard.streamer.plan.whole_tensors import compare_whole
from safeshard.streamer.sources import ShardCache, open_source

T = TypeVar("T")


class Planner:
    """Opens each input once, however many jobs name it, and collects every offence of every job."""

    def __init__(self, cache: ShardCache | None = None) -> None:
        self._cache = cache or ShardCache()
        self.offences: list[Offence] = []
        self._opened: dict[tuple[str, ...], Any] = {}

    def plan(self, jobs: Sequence[Job], overwrite: bool, skip_finished: bool = False) -> list[JobPlan]:
        """Plan all jobs; with `skip_finished` those that this very request has finished before are passed by.

        Raises:
            RequestError: some job cannot run; every offence of every job.
        """
        plans = [plan for job in jobs if (plan := self._plan(job)) is not None]
        for plan in (p for p in plans if p.job.writes_model):
            if (skip_finished and not overwrite) or _has_journal(plan.job.output):
                plan.finished = finished(plan)
        self.offences += output_offences(jobs, plans, overwrite)
        if self.offences:
            raise RequestError(list(dict.fromkeys(self.offences)))
        return plans

    def plan_inputs(self, job: Job) -> JobPlan:
        """Plan one job whose output is not to be published: where it would go is not looked at.

        Raises:
            RequestError: every offence of its inputs.
        """
        plan = self._plan(job)
        if plan is None:
            raise RequestError(list(dict.fromkeys(self.offences)))
        return plan

    def _plan(self, job: Job) -> JobPlan | None:
        inputs: dict[str, Checkpoint | Adapter] = {}
        for role, spec in job.inputs().items():
            base = inputs.get("aligned")
            opened: Checkpoint | Adapter | None = None
            if not role.endswith("adapter"):
                opened = self._open((spec,), partial(self._checkpoint, spec))
                if opened is not None and isinstance(base, Checkpoint):
                    names = ("names", spec, base.source.identity)
                    opened = self._open(names, partial(in_names_of, base, opened))
            elif isinstance(base, Checkpoint):
                packing = job.expert_packing
                key = (spec, base.source.identity, packing or "")
                opened = self._open(key, partial(self._adapter, spec, base, packing))
            else:
                continue
            if opened is not None:
                inputs[role] = opened
        if inputs.keys() != job.inputs().keys():
            return None
        plan = JobPlan(job, inputs)
        for role, given in inputs.items():
            if isinstance(given, Adapter) and given.places:
                pair = ("whole", given.source.identity, plan.aligned.source.identity)
                plan.whole[role] = self._open(pair, partial(compare_whole, given, plan.aligned)) or {}
        offences = list(input_offences(plan))
        if not offences and isinstance(job, SafeDelta | Ridge):
            plan.factors = self._open(("factors", job.factors_key()), partial(open_factors, plan.aligned, job))
            if plan.factors is None:
                return None
            offences = list(factor_offences(plan.factors, job))
        if not offences:
            plan_outputs(plan)
            if job.writes_model:
                plan_side_files(plan)
            plan.cautions += cautions(plan)
            offences = list(self._equal_offences(plan))
            if plan.layout is not None and job.dequantize:
                written = {name for module in plan.modules.values() for name in module.outputs}
                offences += left_encoded(plan.aligned, written, plan.layout)
        self.offences += offences
        return None if offences else plan

    def _checkpoint(self, spec: str) -> Checkpoint:
        return open_checkpoint(open_source(spec, self._cache))

    def _adapter(self, spec: str, base: Checkpoint, packing: Packing | None) -> Adapter:
        return open_adapter(open_source(spec, self._cache), base, packing)

    def _open(self, key: tuple[str, ...], opener: Callable[[], T]) -> T | None:
        if key not in self._opened:
            try:
                self._opened[key] = opener()
            except RequestError as error:
                self.offences += error.offences
                self._opened[key] = None
            except RunError as error:  # reading a header failed: nothing was begun yet
                self.offences.append(Offence(error.message, remedy=error.remedy))
                self._opened[key] = None
        return self._opened[key]  # type: ignore[no-any-return]

    def _equal_offences(self, plan: JobPlan) -> Iterator[Offence]:
        pairs: dict[str, list[tuple[Weight, Weight]]] = {}
        for module in plan.modules.values():
            if module.aligned and module.unaligned:
                pairs.setdefault("unaligned", []).append((module.aligned, module.unaligned))
            if module.aligned and isinstance(module.finetuned, Weight):
                pairs.setdefault("finetuned", []).append((module.aligned, module.finetuned))
        for role, weights in pairs.items():
            other = plan.inputs[role]
            key = ("equal", plan.aligned.source.identity, other.source.identity)
            if key not in self._opened:
                self._opened[key] = _same(weights)
            if self._opened[key]:
                yield Offence(
                    other.source.spec, "", "weights that differ from --aligned", "the same weights", f"check --{role}"
                )


def _same(weights: list[tuple[Weight, Weight]]) -> bool:
    """Whether all pairs of weights are equal, in what is stored."""
    pairs = []
    for ours, theirs in weights:
        regions = [list(ours.reads()), list(theirs.reads())]
        if len(regions[0]) != len(regions[1]):
            return False
        pairs += [((a.source, a.ref), (b.source, b.ref)) for a, b in zip(*regions, strict=True)]
    return same_tensors(pairs)


def _has_journal(output: Path) -> bool:
    """Whether a run was interrupted right after the output had got its name."""
    try:
        return (output / JOURNAL_NAME).is_file()
    except OSError:  # the name is too long, which is refused below
        return False
