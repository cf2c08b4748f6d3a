"""The error family of the whole project, and the escaping of names that come from files.

Every error a user can meet derives from `SafeshardError` and knows the exit status of the process. Names of tensors,
files and options are read from files that others wrote, so whatever prints them goes through `printable`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

MAX_LISTED = 20
MAX_NAME = 120  # characters of a name among others
MAX_PRINTED = 400
_SCHEME = r"(?<![\w+.-])((?!file:)[A-Za-z](?:[A-Za-z\d+.-]*://|[A-Za-z\d+.-]+:/)"  # the last of a path, made of a URL
_USERINFO = re.compile(_SCHEME + r")[^\s/?#'\"<>]*@(?=[^\s/?#])")
_QUERY = re.compile(_SCHEME + r"[^\s?#'\"<>]*)[?#][^\s'\"<>]*")


def printable(text: object, limit: int = MAX_PRINTED) -> str:
    """`str(text)` fit for a terminal: unprintable characters as backslash escapes, at most `limit` characters.

    Control characters, bidirectional overrides, invisible formatting and lone surrogates are all unprintable in
    Unicode's sense, hence escaped; plain spaces and letters of any script stay.
    """
    raw = without_secrets(str(text))
    cut = raw[:limit]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return escaped if len(raw) <= limit else f"{escaped}... ({len(raw)} characters)"


def without_secrets(text: str) -> str:
    """`text` without the userinfo and the query of each URL in it: passwords, tokens and signatures are there."""
    return _QUERY.sub(r"\1", _USERINFO.sub(r"\1", text)) if ":/" in text else text


class SafeshardError(Exception):
    """Base of every error with a message for the user; `exit_status` is what the command line exits with."""

    exit_status = 1


@dataclass(frozen=True)
class Offence:
    """One thing that is wrong with a request: `where` (file or option), `what` (tensor, module or field, or "")."""

    where: str
    what: str = ""
    expected: str = ""
    got: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        subject = printable(self.where) + (f": {printable(self.what)}" if self.what else "")
        facts = [
            f"{label} {printable(value)}"
            for label, value in (("expected", self.expected), ("got", self.got))
            if value != ""
        ]
        text = f"{subject}: {', '.join(facts)}" if facts else subject
        return f"{text} ({printable(self.remedy)})" if self.remedy else text


class RequestError(SafeshardError):
    """The request is wrong and nothing was written (exit status 2). Carries every offender, not only the first."""

    exit_status = 2

    def __init__(self, offences: Offence | Sequence[Offence]) -> None:
        self.offences: tuple[Offence, ...] = (offences,) if isinstance(offences, Offence) else tuple(offences)
        if not self.offences:
            raise ValueError("a RequestError needs at least one offence")
        super().__init__(self.offences)

    def __str__(self) -> str:
        """One line a kind of offence: what is said of several tensors is said once, with their names."""
        kinds: dict[tuple[str, ...], list[Offence]] = {}
        for o in self.offences:
            kinds.setdefault((o.where, o.expected, o.got, o.remedy), []).append(o)
        lines = [_line(alike) for alike in islice(kinds.values(), MAX_LISTED)]
        count = len(self.offences)
        if count == 1:
            return lines[0]
        of = "" if len(kinds) == count else f" of {len(kinds)} kind{'s' * (len(kinds) > 1)}"
        head = f"{count} problems{of}:"
        more = [f"  and {len(kinds) - MAX_LISTED} more"] if len(kinds) > MAX_LISTED else []
        return "\n".join([head, *(f"  - {line}" for line in lines), *more])


def _line(alike: Sequence[Offence]) -> str:
    """What is said of several things, the first few of them named."""
    if len(alike) == 1:
        return str(alike[0])
    listed = ", ".join(printable(o.what, MAX_NAME) for o in alike[:MAX_LISTED])
    more = f" and {len(alike) - MAX_LISTED} more" if len(alike) > MAX_LISTED else ""
    return f"{replace(alike[0], what='')}: {listed}{more}"


class RunError(SafeshardError):
    """It failed underway (exit status 1); running the same command again resumes unless the remedy says otherwise."""

    exit_status = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        message = printable(self.message, limit=10 * MAX_PRINTED)
        return f"{message} ({printable(self.remedy)})" if self.remedy else message
