"""What came of a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safeshard.manifests.schema import Caution, Manifest
from safeshard.streamer.methods.base import Job
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.write.part_record import PartRecord


@dataclass(frozen=True, repr=False)
class Result:
    """What came of a job: its plan, its manifest (None for a score or a dry run), and each module's cosine.

    `reverted` names the modules that the method could not treat, kept aligned instead, and says why.
    """

    job: Job
    plan: JobPlan
    manifest: Manifest | None
    cosines: Mapping[str, float | None]
    reverted: Mapping[str, str] = field(default_factory=dict)
    record: PartRecord | None = None  # of a part of a batch that is finished

    @property
    def output(self) -> Path | str:
        """The folder that was written, or the URL of its place afar."""
        return self.job.output

    def __repr__(self) -> str:
        decisions = Counter(entry.decision for entry in self.manifest.modules) if self.manifest else Counter[str]()
        shown = ", ".join(f"{count} {decision}" for decision, count in decisions.most_common())
        if self.plan.part is not None:
            shown = f"part {self.plan.part}, " + ("finished" if self.record else "unfinished")
        outcome = shown or (f"{len(self.cosines)} cosines" if self.cosines else "nothing written")
        output = str(self.output) if self.job.writes_model else None
        return f"Result({self.job.method!r}, output={output!r}, {len(self.plan.modules)} modules: {outcome})"

    @property
    def warnings(self) -> tuple[Caution, ...]:
        """What to know before the output is used."""
        return tuple(self.plan.cautions) if self.manifest is None else self.manifest.warnings or ()


def earlier(plan: JobPlan) -> Result:
    """The result of a job whose output was there."""
    assert plan.finished is not None
    cosines = {entry.name: entry.cosine for entry in plan.finished.modules}
    due = plan.factors.modules if plan.factors else frozenset()
    reverted = {
        e.name: e.note or "" for e in plan.finished.modules if e.decision == "reverted" and plan.linear(e.name) in due
    }
    return Result(plan.job, plan, plan.finished, cosines, reverted)
