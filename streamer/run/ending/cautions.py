"""What the decisions show that whoever uses the output should know: warned about, or refused with --strict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safeshard.manifests.schema import Caution, Effect
from safeshard.streamer.run.flow.effects import total
from safeshard.streamer.run.flow.tasks import JobRun

REMOVED = 0.1  # of the delta's norm, below which nearly all is gone
GREW, ONE_GREW = 1.01, 1.05  # times the norm of the whole delta, or of a module's
SAME = 1e-9
NEAR_LEAK = 0.05  # how far from the leak that was asked for is near
Entry = Mapping[str, Any]


def cautions(job_run: JobRun) -> list[Caution]:
    """All warnings about a job whose modules are decided: those of its plan, and what came out."""
    entries = [job_run.entries[name] for name in job_run.plan.modules]
    found = list(_found(job_run, entries, total(entries)))
    kinds = {each.kind for each in found}
    return [*(each for each in job_run.plan.cautions if each.kind not in kinds), *found]


def _found(job_run: JobRun, entries: Sequence[Entry], effect: Effect | None) -> Iterator[Caution]:
    if entries and all(entry.get("effect", {}).get("delta_norm") == 0 for entry in entries):
        text = f"the fine-tuned delta is zero in all {len(entries)} modules: there was nothing to treat"
        yield Caution(kind="empty", text=text, remedy="check the fine-tune: an untrained adapter, or an alpha of 0?")
    elif entries and all(map(_is_unchanged, entries)):
        yield _unchanged(entries)
    elif effect is not None:
        yield from _size(job_run, entries, effect)
    yield from _leak(job_run, entries)
    if job_run.job.gated and (undefined := sum("cosine" not in entry for entry in entries)):
        text = (
            f"the gate of {undefined} of {len(entries)} modules is undefined: a delta, or aligned less unaligned, is 0"
        )
        yield Caution(kind="undefined", text=text, remedy="check the inputs; the manifest names the modules")


def _leak(job_run: JobRun, entries: Sequence[Entry]) -> Iterator[Caution]:
    """A leak that was asked for and that no strength among those tried comes to."""
    asked, strength = job_run.job.target_leak, job_run.strength
    energies = [entry for entry in entries if "leak" in entry and entry.get("energy")]
    total_energy = math.fsum(entry["energy"] for entry in energies)
    if asked is None or strength is None or not total_energy:
        return
    reached = math.fsum(entry["leak"] * entry["energy"] for entry in energies) / total_energy
    safest, most_lenient = (job_run.job.strengths[end] for end in (0, -1))
    found = f"{reached:.3g} of the delta's energy on safe inputs is let through"
    if strength == most_lenient and reached < asked * (1 - NEAR_LEAK):
        text = f"--leak {asked:g} was not reached: {found} at the most lenient strength that is tried, {strength:g}"
        yield Caution(kind="leak", text=text, remedy="ask for less, or take `scale`")
    elif strength == safest and reached > asked * (1 + NEAR_LEAK):
        text = f"--leak {asked:g} was exceeded: {found} at the safest strength that is tried, {strength:g}"
        yield Caution(kind="leak", text=text, remedy="ask for more")


def _is_unchanged(entry: Entry) -> bool:
    effect = entry.get("effect", {})
    kept, cosine = effect.get("kept_norm"), effect.get("cosine")
    same = kept is not None and cosine is not None and abs(kept - 1) <= SAME and cosine >= 1 - SAME
    return entry["decision"] == "kept" or same


def _unchanged(entries: Sequence[Entry]) -> Caution:
    text, remedy = f"nothing was changed: all {len(entries)} modules are as they were fine-tuned", None
    cosines = [entry["cosine"] for entry in entries if "cosine" in entry]
    if cosines:
        text += f"; their cosines lie between {min(cosines):.4f} and {max(cosines):.4f}"
        remedy = f"--threshold {least_threshold(cosines):.4f} would change a module"
    return Caution(kind="unchanged", text=text, remedy=remedy)


def least_threshold(cosines: Sequence[float]) -> float:
    """A threshold, of four places, just above the lowest cosine."""
    return math.floor(min(cosines) * 10_000 + 1) / 10_000


def _size(job_run: JobRun, entries: Sequence[Entry], effect: Effect) -> Iterator[Caution]:
    kept, cosine = effect.kept_norm or 0.0, effect.cosine or 0.0
    remedy = f"{job_run.job.keeps_more} keeps more"
    if kept < REMOVED:
        text = f"nearly all of the fine-tuned delta was removed: {kept:.1%} of its norm is left"
        yield Caution(kind="removed", text=text, remedy=remedy)
    elif kept * cosine < REMOVED:
        text = f"what was written hardly follows the fine-tuned delta: cosine {cosine:.3f}, {kept:.1%} of its norm"
        yield Caution(kind="removed", text=text, remedy=remedy)
    sizes = {entry["name"]: entry["effect"].get("kept_norm") or 0.0 for entry in entries if "effect" in entry}
    grown = [name for name, size in sizes.items() if size > ONE_GREW]
    if kept > GREW or grown:
        text = f"the delta grew: its norm is {kept:.1%} of the fine-tuned one's" if kept > GREW else ""
        if grown:
            most = max(grown, key=sizes.__getitem__)
            text += "; " if text else "the delta grew in single modules: "
            text += f"{len(grown)} of {len(entries)} grew, most {most} to {sizes[most]:.1%}"
        yield Caution(kind="grew", text=text, remedy=job_run.job.grows)
