"""Opening a repository of the Hub, online or from its cache, and what helps where that fails."""

from __future__ import annotations

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.sources.base import Source, reason, refuse
from safeshard.streamer.sources.hub.place import HubPlace
from safeshard.streamer.sources.hub.repository import HubSource
from safeshard.streamer.sources.hub.shard_cache import ShardCache, hub_cache
from safeshard.streamer.sources.hub.snapshot import Snapshot
from safeshard.streamer.sources.remote import fault_of, is_unresolved


def open_hub(spec: str, cache: ShardCache) -> Source:
    """A repository of the Hub; offline, the folder of its snapshot in the cache.

    Raises:
        RequestError: the name is malformed, or the repository is missing, gated or out of reach.
    """
    from huggingface_hub import constants

    place = HubPlace.parse(spec)
    if place is None:
        expected = "hf://org/name, hf://org/name@revision or hf://org/name@revision/folder"
        raise refuse(spec, expected, "another form", "correct the name")
    opener = _snapshot if constants.HF_HUB_OFFLINE else _online
    failures: list[RequestError] = []
    for reading in place.readings():
        try:
            return opener(spec, reading, cache)
        except RequestError as error:
            failures.append(error)
            if not isinstance(error.__cause__, Exception) or "Revision" not in str(error):
                break
    raise failures[0]


def _online(spec: str, place: HubPlace, cache: ShardCache) -> Source:
    try:
        return HubSource(spec, place, cache)
    except RequestError:
        raise
    except Exception as error:  # the network layer's errors have no common base
        cause = error.__cause__ if isinstance(error, RunError) and isinstance(error.__cause__, Exception) else error
        remedy = cause.remedy if isinstance(cause, RunError) else _remedy(cause, place, spec)
        raise refuse(spec, "a folder, or a repository on the Hub", reason(cause), remedy) from cause


def _remedy(error: BaseException, place: HubPlace, spec: str) -> str:
    """What helps when a repository cannot be opened."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    said = str(getattr(getattr(error, "response", None), "headers", {}).get("X-Error-Code", "")) + str(error)
    if "Gated" in said or "GatedRepoError" in kinds:
        page = f"https://huggingface.co/{place.repo}"
        return f"accept the terms on {page}, and log in (`hf auth login` or HF_TOKEN) with an account that did"
    if "RepositoryNotFoundError" in kinds:
        return "check the name; a private repository wants a login (`hf auth login` or HF_TOKEN)"
    if "RevisionNotFoundError" in kinds:
        return "check the revision: a branch, a tag or a commit"
    remedy = fault_of(error).remedy
    if is_unresolved(error) and not spec.startswith("hf://"):
        remedy = (
            "there is no folder of this name here, and the Hub is out of reach: correct the path, or check the network"
        )
    if fault_of(error).again and (commit := _cached_commit(place)):
        remedy += f"; or set HF_HUB_OFFLINE=1 to use what the cache holds of commit {commit[:12]}"
    return remedy


def _cached_commit(place: HubPlace) -> str | None:
    """The commit that the cache has of a place."""
    folder = hub_cache() / f"models--{place.repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / (place.revision or "main")).read_text().strip()
    except OSError:
        commit = place.revision or ""
    return commit if commit and (folder / "snapshots" / commit).is_dir() else None


def _snapshot(spec: str, place: HubPlace, cache: ShardCache) -> Source:
    commit = _cached_commit(place)
    root = hub_cache() / f"models--{place.repo.replace('/', '--')}"
    if commit is None or not (folder := root / "snapshots" / commit / place.folder).is_dir():
        expected = "a folder, or a repository in the Hub's cache (HF_HUB_OFFLINE is set)"
        what = f"revision {place.revision}" if place.revision else "it"
        remedy = f"download it (`hf download {place.repo}`, or a run with --cache), or unset HF_HUB_OFFLINE"
        raise refuse(spec, expected, f"no copy of {what} in {root.parent}", remedy)
    return Snapshot(folder, spec, commit)
