"""A repository of the Hugging Face Hub, or a folder in it, as a source."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from safeshard.streamer.sources.base import Checked, Transfer, refuse, require
from safeshard.streamer.sources.http import Answer, Target
from safeshard.streamer.sources.hub.held import Held
from safeshard.streamer.sources.hub.kept_headers import keep_header, load_header
from safeshard.streamer.sources.hub.place import HubPlace
from safeshard.streamer.sources.hub.shard_cache import ShardCache, Wanted, damaged, hub_cache, keep_small, note_branch
from safeshard.streamer.sources.hub.stated import Stated
from safeshard.streamer.sources.hub.xet import XetRanges
from safeshard.streamer.sources.remote import OPENING, UNDERWAY, Final, Line

ADAPTER = "adapter_model.safetensors"  # which every job reads whole
WHOLE_BYTES = 64 << 20  # up to this size it is fetched at once, when its first tensor is read
_CONFIGS = ("config.json", "adapter_config.json")


class HubSource:
    """A repository of the Hub, pinned to the commit that its revision names at the start.

    Small files, and an adapter's weights, are fetched whole, hashed and held. Of shards the ranges that are asked for
    go straight into the buffers; a shard that lies in the Hub's cache is hashed once and read from there.

    Raises:
        Exception: whatever huggingface_hub raises for a repository that is missing, gated or out of reach.
    """

    far = True

    def __init__(self, spec: str, place: HubPlace, cache: ShardCache) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.spec, self._place, self._cache, self._line = spec, place, cache, Line()
        api = HfApi()
        info = self._line.call(
            spec, lambda: api.model_info(place.repo, revision=place.revision, files_metadata=True, timeout=30)
        )
        commit = str(info.sha)
        self.revision: str | None = commit
        self.identity = place.pinned(commit)
        under = f"{place.folder}/" if place.folder else ""
        self._files = {
            s.rfilename.removeprefix(under): Stated(s.rfilename, int(s.size or 0), s.blob_id or "", _sha256(s))
            for s in info.siblings or []
            if s.rfilename.startswith(under) and "/" not in s.rfilename.removeprefix(under)
        }
        if place.folder and not self._files:
            raise refuse(spec, f"a folder of {place.repo}", _folders(info), "correct the name")
        self._headers = build_hf_headers()
        self._xet = XetRanges(place.repo, commit, self._headers)
        self._wanted = {name: self._want(name, file, commit) for name, file in self._files.items()}
        self._held: dict[str, Held] = {}
        self._heads: dict[str, bytes] = {}
        self._checked: dict[str, Checked] = {}
        self._locks = {name: threading.Lock() for name in self._files}
        if cache.fetches:
            note_branch(self._wanted_place, place.revision, commit)
        for name in self._files.keys() & set(_CONFIGS):  # shows a gated repository
            self._whole(name, OPENING)

    @property
    def _wanted_place(self) -> Path:
        return hub_cache() / f"models--{self._place.repo.replace('/', '--')}"

    def _want(self, name: str, file: Stated, commit: str) -> Wanted:
        from huggingface_hub import hf_hub_url

        def check(answer: Answer) -> None:
            heads = [head for head in (answer.first, answer.headers) if head is not None]
            for head, key, stated in ((h, k, v) for h in heads for k, v in expected.items()):
                if head.get(key, stated).strip('"') != stated:
                    problem = (
                        f"{self.spec}/{name}: the server sends another file ({key} {head[key]}, {stated} expected)"
                    )
                    raise Final(problem, "use another mirror, then run the same command again")
            if answer.first is not None and (xet_hash := answer.first.get("X-Xet-Hash")):
                self._xet.hashes[name] = xet_hash

        expected = {"X-Repo-Commit": commit, "X-Linked-Size": str(file.size)}
        if file.sha256:
            expected["X-Linked-ETag"] = file.sha256
        url = hf_hub_url(self._place.repo, file.path, revision=commit)
        target = Target(f"{self.spec}/{name}", url, file.size, self._headers, check=check)
        return Wanted(self._wanted_place, commit, file, target)

    def sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self._files.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        require(self, name)
        if start >= stop:  # no range says this
            return b""
        if self._is_held(name) and (name != ADAPTER or name in self._held):
            return self._whole(name, OPENING).read(start, stop)
        return self._from_head(name, start, stop)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        require(self, name)
        where = f"{self.spec}/{name}"
        if not len(view):
            return
        if self._is_held(name):
            self._whole(name, UNDERWAY).readinto(where, offset, view)
        elif self._cache.readinto(self._line, self._wanted[name], offset, view):
            self._checked[name] = "hash"
        else:
            self._checked.setdefault(name, "ranges")
            if not self._xet.readinto(self._line, name, self._files[name].size, offset, view):
                self._wanted[name].target.fill(self._line, offset, view)

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        pass

    def local_path(self, name: str) -> None:
        return None

    def changed(self) -> set[str]:
        return set()  # a commit's files do not change

    def checked(self, name: str) -> Checked | None:
        return self._checked.get(name)

    def transfer(self, name: str) -> Transfer:
        if self._cache.has(self._wanted[name]):
            return "none"
        return "whole" if self._is_held(name) or self._cache.fetches else "ranges"

    def keeps(self, name: str) -> bool:
        return self._cache.fetches and self.transfer(name) == "whole"

    def stop(self) -> None:
        self._line.stop()

    def _is_held(self, name: str) -> bool:
        return not name.endswith(".safetensors") or (name == ADAPTER and self._files[name].size <= WHOLE_BYTES)

    def _whole(self, name: str, tries: int) -> Held:
        """A small file, hashed."""
        file, wanted = self._files[name], self._wanted[name]
        with self._locks[name]:  # one download a file, however many readers wait for it
            if name not in self._held:
                data = wanted.blob.read_bytes() if self._cache.has(wanted) else None
                if data is None or not file.holds(data):
                    data = wanted.target.whole(self._line, tries)
                    if not file.holds(data):
                        raise damaged(wanted.target.where, file)
                    if self._cache.fetches:
                        keep_small(wanted, data)
                if not data.startswith(head := self._heads.get(name, b"")):  # which told where the tensors lie
                    raise damaged(f"the header of {wanted.target.where}, {len(head)} bytes", file)
                self._held[name] = Held(wanted.target.where, data)
                self._checked[name] = "hash"
            return self._held[name]

    def _from_head(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of a shard. Its first ones, the header, are kept from the dry run to the run."""
        wanted, sha256 = self._wanted[name], self._files[name].sha256
        if self._cache.has(wanted):
            buffer = bytearray(stop - start)
            if self._cache.readinto(self._line, wanted, start, memoryview(buffer)):
                return bytes(buffer)
        if name not in self._heads:
            self._heads[name] = load_header(sha256) if sha256 else b""
        head = self._heads[name]
        if stop <= len(head):
            return head[start:stop]
        buffer = bytearray(stop - start)
        wanted.target.fill(self._line, start, memoryview(buffer), OPENING)
        if start == len(head):
            self._heads[name] = head + buffer
            if start and sha256:  # the length alone is not worth it
                keep_header(sha256, self._heads[name])
        return bytes(buffer)


def _sha256(sibling: Any) -> str | None:
    lfs = sibling.lfs
    found = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{64}", found) else None


def _folders(info: Any) -> str:
    """The folders of a repository that hold weights, for a message."""
    names = {s.rfilename.rpartition("/")[0] for s in info.siblings or [] if s.rfilename.endswith(".safetensors")}
    return "nothing there; folders with weights: " + (", ".join(sorted(names - {""})[:8]) or "none")
