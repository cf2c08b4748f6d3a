"""A repository of the Hugging Face Hub as a source."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import Source, reason, refuse, require, short
from safeshard.streamer.sources.local import LocalSource

HUB_NAME = re.compile(
    r"(?:hf://)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[\w-][\w./-]*))?", re.ASCII
)
_CONFIGS = ("config.json", "adapter_config.json")


class HubSource:
    """A repository of the Hugging Face Hub, pinned to the commit that its revision names at the start.

    Headers are read by ranged requests; every other file is downloaded to the Hub's cache when first read.

    Raises:
        Exception: whatever huggingface_hub raises for a repository that is missing, gated or out of reach.
    """

    def __init__(self, spec: str, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        self.spec, self.repo = spec, repo
        self.revision: str | None = str(info.sha)
        self.identity = f"hf://{repo}@{self.revision}"
        self._sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or [] if "/" not in s.rfilename}
        self._fetched: dict[str, LocalSource] = {}
        self._locks = {name: threading.Lock() for name in self._sizes}
        for name in self._sizes.keys() & _CONFIGS:  # shows a gated repository, and notes the branch for offline use
            hf_hub_download(repo, name, revision=revision)

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import try_to_load_from_cache

        require(self, name)
        cached = isinstance(try_to_load_from_cache(self.repo, name, revision=self.revision), str)
        if name.endswith(".safetensors") and not cached:
            return self._request(name, start, stop)
        return self._fetch(name).read(name, start, stop)

    def _request(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

        if start == stop:  # no range says this
            return b""
        where, url = f"{self.spec}/{name}", hf_hub_url(self.repo, name, revision=self.revision)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
        except Exception as error:  # the network layer's errors have no common base
            raise RunError(f"{where}: {reason(error)}", "check the network, then run again") from error
        if len(response.content) != stop - start:
            raise short(where, start + len(response.content), stop)
        return bytes(response.content)

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        self._fetch(name).readinto(name, offset, view)

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        self._fetch(name).prefetch(name, offset, nbytes)

    def local_path(self, name: str) -> Path:
        return self._fetch(name).local_path(name)

    def changed(self) -> set[str]:
        return set()  # a commit's files do not change

    def _fetch(self, name: str) -> LocalSource:
        from huggingface_hub import hf_hub_download

        require(self, name)
        with self._locks[name]:  # one download a file, however many readers wait for it
            if name not in self._fetched:
                try:
                    path = Path(hf_hub_download(self.repo, name, revision=self.revision))
                except Exception as error:  # the network layer's errors have no common base
                    message = f"{self.spec}/{name}: the download failed: {reason(error)}"
                    raise RunError(message, "check the network, then run again") from error
                self._fetched[name] = LocalSource(path.parent, self.spec, self.revision)
            return self._fetched[name]


def open_hub(spec: str) -> Source:
    """A repository of the Hub; offline, the folder of its snapshot in the cache.

    Raises:
        RequestError: the name is malformed, or the repository is missing, gated or out of reach.
    """
    from huggingface_hub import constants, snapshot_download

    match = HUB_NAME.fullmatch(spec)
    if match is None:
        raise refuse(spec, "hf://org/name or hf://org/name@revision", "another form", "correct the name")
    repo, revision = match["repo"], match["revision"]
    place, remedy = "on the Hub", "check the name, the revision, HF_TOKEN and the network"
    try:
        if not constants.HF_HUB_OFFLINE:
            return HubSource(spec, repo, revision)
        place, remedy = "in the Hub's cache (HF_HUB_OFFLINE is set)", "download it, or name a folder"
        # Nothing is asked for, so an incomplete snapshot will do: what a job lacks is refused by name later.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception as error:  # the network layer's errors have no common base
        raise refuse(spec, f"a folder, or a repository {place}", reason(error), remedy) from error
    return LocalSource(folder, spec, folder.name)


def pinned(spec: str, revision: str | None) -> str:
    """What to write for a Hub repository at a commit; other places stay as they are."""
    match = HUB_NAME.fullmatch(spec) if revision is not None else None
    return f"hf://{match['repo']}@{revision}" if match else spec
