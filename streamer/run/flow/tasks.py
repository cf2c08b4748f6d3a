"""What a pass does: a job under way, one of its modules, a tensor that it takes over."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from safeshard.manifests.schema import Fallback
from safeshard.streamer.inputs.read import Read
from safeshard.streamer.methods.base import Job
from safeshard.streamer.methods.shared.leak import strength_for
from safeshard.streamer.plan.job_plan import Copy, JobPlan, ModulePlan, Pair, Weight
from safeshard.streamer.run.flow.assemble import Assembler
from safeshard.streamer.write.writer import Writer


@dataclass
class JobRun:
    """One job under way: its plan, its writer (None for a score), and what was decided so far."""

    plan: JobPlan
    writer: Writer | None = None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    cosines: dict[str, float | None] = field(default_factory=dict)
    chosen: set[str] | None = None
    limit: float | None = None  # the highest cosine among the chosen
    curves: dict[str, list[float]] = field(default_factory=dict)  # what `measure` gave; empty where there is no factor
    strength: float | None = None  # what follows from all curves
    fallbacks: list[Fallback] = field(default_factory=list)

    @property
    def job(self) -> Job:
        return self.plan.job

    @cached_property
    def assembler(self) -> Assembler:
        """Puts together the output tensors that several modules write to."""
        assert self.writer is not None
        return Assembler.of(self.plan, self.writer)

    def is_done(self, module: str) -> bool:
        """Whether this pass has nothing left to do for a module."""
        if self.measures and self.has_factor(module):
            return module in self.curves
        if self.writer is None or (self.job.ranks_first and self.chosen is None):
            return module in self.cosines
        return module in self.entries

    @property
    def waits(self) -> bool:
        """Whether numbers of all modules of the output must be known before it goes on."""
        return self.measures or (self.job.ranks_first and self.chosen is None)

    def know(self, cosines: Mapping[str, float | None], curves: Mapping[str, Sequence[float]]) -> None:
        """Let the job decide what it does by the numbers of all modules."""
        if self.job.ranks_first:
            self.chosen = self.job.choose(cosines)
            self.limit = max((c for name in self.chosen if (c := cosines[name]) is not None), default=None)
        if self.measures:
            leak = self.job.target_leak
            assert leak is not None
            self.strength = strength_for(leak, self.job.strengths, [curve for curve in curves.values() if curve])

    @property
    def measures(self) -> bool:
        """Whether this pass measures what each strength lets through, to choose one."""
        return self.job.target_leak is not None and self.strength is None

    def measured(self, module: str, curve: list[float]) -> None:
        """Keep what a module lets through at each strength, also in the journal."""
        self.curves[module] = curve
        if self.writer:
            self.writer.record("curve", name=module, curve=curve)

    def strength_or(self, default: float) -> float:
        """The strength at which a job is served, as far as it is known."""
        asked = getattr(self.job, "penalty", None)
        return asked if asked is not None else default if self.strength is None else self.strength

    def score(self, module: str, cosine: float | None) -> None:
        """Keep a module's cosine (None: undefined), also in the journal where a later pass needs it."""
        self.cosines[module] = cosine
        if self.writer and self.job.ranks_first:
            self.writer.record("cosine", name=module, cosine=cosine)

    def decide(self, module: str, entry: dict[str, Any]) -> None:
        """Keep a module's manifest entry, also in the journal."""
        self.entries[module] = entry
        if self.writer:
            self.writer.record("module", entry=entry)

    def fall_back(self, fallback: Fallback) -> None:
        """Keep what was done otherwise than asked, also in the journal."""
        self.fallbacks.append(fallback)
        if self.writer:
            self.writer.record("fallback", entry=fallback.model_dump(mode="json", exclude_none=True))

    def has_factor(self, module: str) -> bool:
        """Whether a module is served in the calibrated pass."""
        return self.plan.factors is not None and self.plan.linear(module) in self.plan.factors.modules

    def untreated(self) -> dict[str, str]:
        """The modules that a factor was due for and that have none, kept aligned, and why."""
        return {
            name: entry.get("note", "")
            for name, entry in self.entries.items()
            if entry["decision"] == "reverted" and self.has_factor(name)
        }

    def needs_gate(self, module: str) -> bool:
        """Whether this pass computes a module's gate: not where ranking has already left it alone."""
        return self.job.gated and (self.chosen is None or module in self.chosen)


@dataclass(frozen=True)
class ModuleTask:
    """One module of one job."""

    run: JobRun
    plan: ModulePlan

    def reads(self) -> Iterator[Read]:
        for place in self.places():
            yield from place.reads()

    def places(self) -> Iterator[Pair | Weight]:
        """What it is computed from in this pass."""
        gated = self.run.needs_gate(self.plan.name)
        yield self.plan.finetuned
        if self.plan.safe is not None:
            yield self.plan.safe
        if self.plan.aligned is not None and (gated or self.run.job.reads_aligned):
            yield self.plan.aligned
        if self.plan.unaligned is not None and (gated or not self.run.job.gated):
            yield self.plan.unaligned

    @property
    def job(self) -> Job:
        """The job, which gives a weight that is encoded again in full precision, whatever the others are cast to."""
        encoded = any(stored.encoded for stored in self.plan.writes.values())
        return self.run.job.model_copy(update={"dtype": None}) if encoded else self.run.job

    @property
    def in_codes(self) -> bool:
        """Whether its gate is all that sees the aligned and the unaligned weights: then nothing is decoded before."""
        return isinstance(self.plan.finetuned, Pair) and not self.run.job.writes_checkpoint

    @property
    def elementwise(self) -> bool:
        """Whether it treats tensors of one form element by element."""
        return self.run.job.edits_all and all(isinstance(p, Weight) and p.stored.is_tensor for p in self.places())

    @property
    def added(self) -> Read | None:
        return self.plan.added

    @property
    def gate_key(self) -> tuple[Hashable, ...]:
        """Equal for tasks with one gate: aligned, unaligned and fine-tuned tensors."""
        places = (self.plan.aligned, self.plan.unaligned, self.plan.finetuned)
        return tuple(place.key if place else None for place in places)


@dataclass(frozen=True)
class CopyTask:
    """One tensor taken over from an input; `cast` where it changes: its dtype, or by rows that are added."""

    run: JobRun
    copy: Copy
    cast: bool

    @property
    def added(self) -> Read | None:
        return self.copy.added

    def reads(self) -> Iterator[Read]:
        if self.cast:
            yield Read(self.copy.source, self.copy.ref)
