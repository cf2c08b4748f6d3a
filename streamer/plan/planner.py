"""The planner: opens every input by its headers, checks everything, and says what will be read and written.

It reads headers. Where these cannot tell, it reads weights too, streamed and no more than the question needs:
- whether two inputs are one (aligned and unaligned, aligned and fine-tuned, fine-tuned and safe, adapters too), by
  comparing what the job computes with until the first difference, so all of it where they are equal;
- whether a tensor that an adapter carries whole (embeddings, a head) was trained, by comparing all of it with the
  aligned one's (`compare_whole`);
- whether factors are of this model, by hashing a few KiB of some weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.schema import JOURNAL_NAME, Fallback
from safeshard.streamer.calibration.factor_files import factor_offences, open_factors
from safeshard.streamer.inputs.adapter import Adapter, open_adapter
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.inputs.compare import same_tensors
from safeshard.streamer.inputs.expert_lora import Packing
from safeshard.streamer.inputs.lies_there import of_a_safe_one
from safeshard.streamer.inputs.names.apply import in_names_of
from safeshard.streamer.methods.base import Job
from safeshard.streamer.methods.shared.calibrated import CalibratedJob
from safeshard.streamer.options import flag
from safeshard.streamer.plan.doubts.bases import base_offences
from safeshard.streamer.plan.doubts.cautions import cautions
from safeshard.streamer.plan.doubts.checks import input_offences
from safeshard.streamer.plan.identity import finished
from safeshard.streamer.plan.job_plan import JobPlan, Pair, Weight
from safeshard.streamer.plan.layout import left_encoded
from safeshard.streamer.plan.written.afar import There, look_at
from safeshard.streamer.plan.written.outputs import plan_outputs
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.plan.written.places import output_offences
from safeshard.streamer.plan.written.serving import serve_offences
from safeshard.streamer.plan.written.side_files import plan_side_files
from safeshard.streamer.plan.written.whole_tensors import compare_whole
from safeshard.streamer.sources import ShardCache, open_source

T = TypeVar("T")
Place = Pair | Weight


class Planner:
    """Opens each input once, and looks at each place once, however many jobs name it and however often it plans.

    It collects every offence of every job.
    """

    def __init__(self, cache: ShardCache | None = None) -> None:
        self._cache = cache or ShardCache()
        self.offences: list[Offence] = []
        self._opened: dict[tuple[str, ...], Any] = {}
        self.there: dict[str, There] = {}  # what lies at each place afar that an output is to have, by URL

    def plan(self, jobs: Sequence[Job], overwrite: bool, skip_finished: bool = False) -> list[JobPlan]:
        """Plan all jobs; with `skip_finished` those that this very request has finished before are passed by.

        Raises:
            RequestError: some job cannot run; every offence of every job.
        """
        self.offences = []
        plans = [plan for job in jobs if (plan := self._plan(job)) is not None]
        places = [plan.job.afar for plan in plans if plan.job.writes_model and plan.job.afar]
        found, offences = look_at(place for place in places if place not in self.there)
        there = self.there = self.there | found
        for plan in (p for p in plans if p.job.writes_model):
            afar = there.get(plan.job.afar or "")
            again = skip_finished or bool(plan.job.push)  # what is finished here may still have to be pushed
            plan.has_journal = _has_journal(plan.job.output, afar)
            if (again and not overwrite) or plan.has_journal:
                plan.finished = finished(plan, afar)
        self.offences += [*offences, *output_offences(jobs, plans, overwrite, there)]
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
            base, before = inputs.get("aligned"), len(self.offences)
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
            if role.startswith("safe"):
                self.offences[before:] = map(of_a_safe_one, self.offences[before:])
            if opened is not None:
                inputs[role] = opened
        if inputs.keys() != job.inputs().keys():
            return None
        tuned, safe, base = (inputs.get(role) for role in ("adapter", "safe_adapter", "aligned"))
        if isinstance(tuned, Adapter) and isinstance(safe, Adapter) and isinstance(base, Checkpoint):
            inputs["safe_adapter"] = safe.named_as(tuned, base)
        plan = JobPlan(job, inputs)
        for role, given in inputs.items():
            if isinstance(given, Adapter) and given.places:
                pair = ("whole", given.source.identity, plan.aligned.source.identity)
                plan.whole[role] = self._open(pair, partial(compare_whole, given, plan.aligned)) or {}
        offences = [*input_offences(plan), *base_offences(plan), *serve_offences(plan)]
        if not offences and isinstance(job, CalibratedJob):
            plan.factors = self._open(("factors", job.factors_key()), partial(open_factors, plan.aligned, job))
            if plan.factors is None:
                return None
            offences = list(factor_offences(plan.factors, job))
            plan.fallbacks += [
                Fallback(asked="calibration", done=note, why=source)
                for source, notes in plan.factors.notes().items()
                for note in notes
            ]
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
                self._opened[key] = error
            except RunError as error:  # reading a header failed: nothing was begun yet
                self._opened[key] = RequestError(Offence(error.message, remedy=error.remedy))
        found = self._opened[key]
        if isinstance(found, RequestError):
            self.offences += found.offences
            return None
        return found  # type: ignore[no-any-return]

    def _equal_offences(self, plan: JobPlan) -> Iterator[Offence]:
        """Inputs that are given as two and are one: by what is stored, wherever it lies."""
        pairs: dict[tuple[str, str], list[tuple[Place, Place]]] = {}
        for module in plan.modules.values():
            if module.aligned and module.unaligned:
                pairs.setdefault(("aligned", "unaligned"), []).append((module.aligned, module.unaligned))
            if module.aligned and isinstance(module.finetuned, Weight):
                pairs.setdefault(("aligned", "finetuned"), []).append((module.aligned, module.finetuned))
            if module.safe and isinstance(module.finetuned, Weight):
                pairs.setdefault(("finetuned", "safe"), []).append((module.finetuned, module.safe))
        if isinstance(plan.finetuned, Adapter) and isinstance(plan.safe, Adapter) and _alike(plan):
            same = [(m.finetuned, m.safe) for m in plan.modules.values() if m.safe]
            pairs["adapter", "safe_adapter"] = same
        for (role, other), places in pairs.items():
            sources = [plan.inputs[each].source for each in (role, other)]
            key = ("equal", *(source.identity for source in sources))
            if key not in self._opened:
                self._opened[key] = sources[0].identity == sources[1].identity or _same(places)
            if self._opened[key]:
                expected = f"weights that differ from {flag(role)}"
                yield Offence(sources[1].spec, "", expected, "the same weights", f"check {flag(other)}")


def _alike(plan: JobPlan) -> bool:
    """Whether two adapters treat the same modules."""
    return all(module.safe is not None for module in plan.modules.values())


def _same(places: list[tuple[Place, Place]]) -> bool:
    """Whether all pairs of weights, or of pairs, are equal in what is stored."""
    pairs = []
    for ours, theirs in places:
        regions = [list(ours.reads()), list(theirs.reads())]
        if len(regions[0]) != len(regions[1]):
            return False
        pairs += [((a.source, a.ref), (b.source, b.ref)) for a, b in zip(*regions, strict=True)]
    return same_tensors(pairs)


def _has_journal(output: Path | str, there: There | None) -> bool:
    """Whether a run was interrupted right after the output had got its name, or its manifest afar."""
    if isinstance(output, str) and there is not None and there.journal is not None:
        return True
    try:
        return ((staging_of(output) if isinstance(output, str) else output) / JOURNAL_NAME).is_file()
    except OSError:  # the name is too long, which is refused below
        return False
