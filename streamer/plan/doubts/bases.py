"""What an adapter says it was trained on, held against the checkpoints that are given: were they mixed up?

`base_model_name_or_path` is the name under which the training script loaded the model: a Hub id, or a folder of that
machine. A mirror or a renamed folder has another, so a name that nothing bears is no more than a warning; one that
`--unaligned` alone bears is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import Caution
from safeshard.streamer.inputs.adapter import Adapter
from safeshard.streamer.options import flag
from safeshard.streamer.plan.job_plan import JobPlan
from safeshard.streamer.sources import LocalSource, Source, is_url
from safeshard.streamer.sources.hub.place import HubPlace

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r".*/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})", re.DOTALL)
_COPY = re.compile(r"(-unsloth)?-bnb-4bit$|-(awq|gptq|fp8)$")  # how quantised copies to train on are named


@dataclass(frozen=True)
class _Place:
    """Where a model lies, as far as that names it: its Hub id, folder and revision."""

    id: str | None
    folder: str | None
    revision: str | None

    @classmethod
    def of(cls, source: Source) -> _Place:
        if source.spec.startswith("hf://") or not isinstance(source, LocalSource):
            known = None if is_url(source.spec) else hub_id(source.spec)
            return cls(known, None, source.revision)
        if match := _SNAPSHOT.fullmatch(source.folder.as_posix()):
            return cls(f"{match['org']}/{match['name']}", source.identity, match["revision"])
        return cls(None, source.identity, source.revision)

    def is_exactly(self, base: str) -> bool:
        """Whether `base` names this place and no other."""
        if self.id is not None and self.id.casefold() == base.casefold():
            return True
        return self.folder is not None and PurePath(base).is_absolute() and self.folder == _real(base)

    def may_be(self, base: str) -> bool:
        """Whether the last part of `base` is this place's too, copies for training included."""
        return any(_last(each) == _last(base) for each in (self.id, self.folder) if each)


def known_id(source: Source) -> str | None:
    """The Hub id of a place that is known to be a repository of the Hub, or a snapshot in its cache."""
    return _Place.of(source).id


def hub_id(spec: str) -> str | None:
    """`org/name` of a place on the Hub."""
    place = HubPlace.parse(spec)
    return place.repo if place else None


def base_offences(plan: JobPlan) -> Iterator[Offence]:
    """Adapters that name the unaligned checkpoint, and not the aligned one, as the model they were trained on."""
    for role, adapter, base, revision in _bases(plan):
        aligned, unaligned = _places(plan)
        if unaligned is None or not unaligned.is_exactly(base):
            continue
        swapped = not aligned.is_exactly(base)
        if aligned.is_exactly(base):  # two revisions of one repository
            swapped = revision is not None and revision == unaligned.revision != aligned.revision
        if swapped:
            got = f"{base}{f'@{revision}' if revision else ''}, which --unaligned is"
            expected = "an adapter of the model under --aligned"
            yield Offence(adapter.source.spec, flag(role), expected, got, "swap --aligned and --unaligned")


def base_cautions(plan: JobPlan) -> Iterator[Caution]:
    """Adapters that name another base model than the aligned one, as far as names show."""
    for role, _, base, revision in _bases(plan):
        aligned, unaligned = _places(plan)
        if aligned.is_exactly(base):
            commits = [c for c in (revision, aligned.revision) if c and _COMMIT.fullmatch(c)]
            if len(set(commits)) == 2:
                text = f"{flag(role)} was trained on revision {commits[0]} of {base}, --aligned is at {commits[1]}"
                yield Caution(kind="mix-up", text=text, remedy=f"use --aligned {base}@{commits[0]}")
        elif not aligned.may_be(base):
            if unaligned is not None and unaligned.may_be(base):
                text = f"{flag(role)} names {base} as its base model, which --unaligned seems to be"
                yield Caution(kind="mix-up", text=text, remedy="are --aligned and --unaligned swapped?")
            elif aligned.id is not None and hub_id(base) == base:
                text = f"{flag(role)} names {base} as its base model, --aligned is {aligned.id}"
                yield Caution(kind="mix-up", text=text, remedy="check that they are the same model")


def _bases(plan: JobPlan) -> Iterator[tuple[str, Adapter, str, str | None]]:
    for role, opened in plan.inputs.items():
        if isinstance(opened, Adapter):
            base, revision = (opened.config.raw.get(key) for key in ("base_model_name_or_path", "revision"))
            if isinstance(base, str) and base:
                yield role, opened, base, revision if isinstance(revision, str) and revision else None


def _places(plan: JobPlan) -> tuple[_Place, _Place | None]:
    unaligned = plan.inputs.get("unaligned")
    return _Place.of(plan.aligned.source), _Place.of(unaligned.source) if unaligned is not None else None


def _last(name: str) -> str:
    return _COPY.sub("", name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold())


def _real(path: str) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file system here can hold
        return path
