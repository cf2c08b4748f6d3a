"""Outputs that were finished by an earlier run: what remains to be done about them, here and afar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME
from safeshard.streamer.disk import clear_errors
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.plan.written.afar import There
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.run.ending.licence import licence
from safeshard.streamer.sources.stores import BucketStore, open_store
from safeshard.streamer.write.destinations import destination, receipts_in
from safeshard.streamer.write.journal import Journal
from safeshard.streamer.write.shipping import Shipping
from safeshard.streamer.write.staging import remove, settle


def settle_finished(plan: JobPlan) -> None:
    """Do what an interrupted run left undone when its output was finished already.

    Raises:
        RequestError: another run is doing it.
        RunError: it could not be done.
    """
    output, staging = plan.job.output, staging_of(plan.job.output)
    if isinstance(output, str):
        with clear_errors(staging):
            _settle_afar(plan, output, staging)
        return
    with clear_errors(output):
        settle(staging, output)
    if plan.job.push:
        _push(plan, output)


def _settle_afar(plan: JobPlan, output: str, staging: Path) -> None:
    """Remove the journal, and this machine's work folder, of a run that put its manifest and went no further."""
    path = staging / JOURNAL_NAME
    with Journal.claim(path) if path.is_file() else contextlib.nullcontext():
        if plan.has_journal and isinstance(store := open_store(output), BucketStore) and _is_of_manifest(plan, store):
            store.delete([JOURNAL_NAME])
        if path.is_file():
            remove(staging, staging)


def _is_of_manifest(plan: JobPlan, store: BucketStore) -> bool:
    """Whether the journal there is of the run that finished the output, not of one that is about to replace it.

    The latter takes the manifest away before it brings anything, so it has receipts of none of the files there.
    """
    there = There.look(store)
    receipts = dict(receipts_in(there.journal or b""))
    files = [file.name for file in plan.files]
    return there.is_whole and all(
        name in receipts and name in there.names and receipts[name].is_as(there.names[name]) for name in files
    )


def _push(plan: JobPlan, output: Path) -> None:
    """Push an output that is finished on this machine, unless the repository holds it already."""
    assert plan.finished is not None
    place = destination(plan.job, frozenset())
    assert place is not None
    assert plan.job.afar is not None
    there = There.look(open_store(plan.job.afar))
    if there.manifest is not None and there.manifest.blake3 == plan.finished.blake3:
        return
    if offences := list(there.offences(overwrite=False)):
        raise RequestError(offences)
    shipping = Shipping(place, {})
    place.begin(None)
    names = [*(file.name for file in plan.finished.files), MANIFEST_NAME]
    shipping.publish({name: output / name for name in names})


def public_offences(plans: Iterable[JobPlan]) -> Iterator[Offence]:
    """Offences of outputs that are to be public though no licence is known to allow it."""
    for plan in plans:
        if plan.job.public and not plan.finished and not licence(plan):
            expected = f"a licence in the model card of {plan.aligned.source.spec} or {plan.finetuned.source.spec}"
            yield Offence("--public", plan.job.afar or "", expected, "none", "state one there, or push it private")
