"""Names of repositories on the Hub, and of folders in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

HUB_NAME = re.compile(
    r"(?:hf://)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<folder>(?:/[\w-][\w.-]*)*)"
    r"(?:@(?P<revision>(?!.*\.\.)[\w-][\w./-]*))?/?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubPlace:
    """What a name says: `hf://org/name@revision/folder`, `org/name/folder`."""

    repo: str
    revision: str | None
    folder: str

    @classmethod
    def parse(cls, spec: str) -> HubPlace | None:
        """The place that a name says; None where it is no name of the Hub."""
        match = HUB_NAME.fullmatch(spec)
        if match is None:
            return None
        return cls(match["repo"], match["revision"], match["folder"].strip("/"))

    def readings(self) -> Iterator[HubPlace]:
        """What a slash after the revision may mean: that a folder follows, or that it belongs to the branch's name."""
        parts = (self.revision or "").rstrip("/").split("/")
        for count in range(len(parts), 0, -1) if parts[0] == "refs" else range(1, len(parts) + 1):
            folder = "/".join([*filter(None, [self.folder]), *parts[count:]])
            yield HubPlace(self.repo, "/".join(parts[:count]) or None, folder)

    def pinned(self, commit: str) -> str:
        """The name at a commit."""
        return f"hf://{self.repo}@{commit}" + (f"/{self.folder}" if self.folder else "")


def pinned(spec: str, revision: str | None) -> str:
    """What to write for a Hub repository at a commit; other places stay as they are."""
    place = HubPlace.parse(spec) if revision is not None else None
    return next(place.readings()).pinned(revision) if place and revision else spec
