"""A repository of the Hub to write to: large files go up as they are finished, then one commit names everything.

The token is the one of `hf auth login` or HF_TOKEN. It goes to the Hub in a header, and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safeshard.streamer.sources.base import refuse
from safeshard.streamer.sources.http import read_body, request, status_words
from safeshard.streamer.sources.remote import OPENING, UNDERWAY, Final, Line, StatusError, retry_after, status_of
from safeshard.streamer.sources.stores.base import ConflictError, Stored, patiently

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

NO_TOKEN = "log in (`hf auth login`, or HF_TOKEN) with a token that may write"
T = TypeVar("T")
log = logging.getLogger(__name__)


class HubStore:
    """A model repository on the Hub."""

    def __init__(self, repo: str) -> None:
        self.repo, self.spec = repo, f"hf://{repo}"
        self._line = Line()
        self._head: str | None = None  # the commit that ours is to follow, and the files that it has
        self._before: set[str] = set()

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi()

    def _info(self) -> Any:
        """What the Hub says of the repository; None where there is none that this token may see."""
        from huggingface_hub import constants, get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        if constants.HF_HUB_OFFLINE:
            raise refuse(self.spec, "the Hub", "HF_HUB_OFFLINE=1", "unset it to push")
        if not get_token():
            raise refuse(self.spec, "a token to push with", "none", NO_TOKEN)
        try:
            return self._api.model_info(self.repo, files_metadata=True)
        except RepositoryNotFoundError:
            return None

    def names(self) -> dict[str, Stored]:
        info = self._call(self._info, OPENING)
        siblings = [] if info is None else info.siblings or []
        return {each.rfilename: Stored(each.size or 0, each.blob_id) for each in siblings}

    def read(self, name: str) -> bytes | None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        def body() -> bytes | None:
            with request("GET", hf_hub_url(self.repo, name), build_hf_headers()) as answer:
                if answer.status == 404:
                    return None
                if answer.status >= 300:
                    raise StatusError(answer.status, status_words(answer), retry_after(answer.headers))
                return read_body(answer)

        return self._call(body, OPENING)

    def make(self, public: bool) -> None:
        """Make the repository, private unless `public`; one that is there keeps what it is.

        Raises:
            RunError: it may not be written, or is public though that was not asked for.
        """
        self._call(lambda: self._api.create_repo(self.repo, private=not public, exist_ok=True))
        info = self._call(self._info, OPENING)
        if info is None:
            raise Final(f"{self.spec} was made, and cannot be seen", NO_TOKEN)
        if info.private is False and not public:
            raise Final(f"{self.spec} is public", "choose another, or give --public")
        if info.private and public:
            log.warning("%s is private already and stays so: change that in its settings", self.spec)
        self._head, self._before = info.sha, {each.rfilename for each in info.siblings or []}

    def preupload(self, name: str, path: Path) -> CommitOperationAdd:
        """Upload a large file, which no commit names yet."""
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(name, str(path))
        self._call(lambda: self._api.preupload_lfs_files(self.repo, [addition], free_memory=False), UNDERWAY)
        return addition

    def commit(self, files: Mapping[str, CommitOperationAdd | Path], last: str, message: str) -> None:
        """Commit files, the earlier ones that are not among them removed, all at once.

        `last` is the file by which a commit whose answer was lost is known again.

        Raises:
            ConflictError: somebody else committed meanwhile.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = {n: CommitOperationAdd(n, str(f)) if isinstance(f, Path) else f for n, f in files.items()}
        mark = Path(str(added[last].path_or_fileobj)).read_bytes()
        gone = sorted(self._before - added.keys() - {".gitattributes"})
        operations: list[Any] = [*added.values(), *(CommitOperationDelete(name) for name in gone)]

        def attempt() -> None:
            try:
                self._api.create_commit(self.repo, operations, commit_message=message, parent_commit=self._head)
            except Exception as error:
                if self._read_again(last) == mark:  # it had come, though its answer had not
                    return
                if status_of(error) in (409, 412):
                    problem = f"{self.spec}: somebody else committed meanwhile"
                    raise ConflictError(problem, "look at the repository, then run again with --overwrite") from None
                raise

        self._call(attempt)

    def _read_again(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except Exception:  # the first error says more
            return None

    def _call(self, work: Callable[[], T], tries: int = UNDERWAY) -> T:
        return patiently(self._line, self.spec, work, tries)

    def stop(self) -> None:
        self._line.stop()
