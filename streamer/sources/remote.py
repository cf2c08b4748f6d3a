"""Requests to machines far away: several under way, retried with patience, and given up at once when told to.

Every request of every remote source runs through a `Line`, on threads that nobody has to wait for: a stop is noticed
within `POLL` seconds whatever a server does, and also where a library blocks.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from safeshard.manifests.errors import RunError, SafeshardError, without_secrets
from safeshard.streamer.sources.base import reason

T = TypeVar("T")
LANES = 16  # requests of one call that are under way at once
POLL = 0.1  # seconds until a stop is noticed
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; doubled each time
LONGEST_ASKED = 900.0  # seconds that a server may ask to wait
OPENING, UNDERWAY = 6, 24  # tries without a byte in between: about 15 seconds, and about 9 minutes
UNRESOLVED = 2  # tries at opening where the server's name has no address: mostly a typo, or a machine without network
AGAIN = {408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529}
NEVER = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError, LookupError, ValueError,
    TypeError, AttributeError, NotImplementedError,
)  # fmt: skip
NEVER_NAMES = {  # of libraries that may not be there
    "PreconditionError", "PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "NotSupportedError",
    "UnknownConfigurationKeyError", "GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError",
    "EntryNotFoundError", "OfflineModeIsEnabled", "NoCredentialsError", "UnsupportedProtocol",
}  # fmt: skip
METADATA_HOST = "169.254.169.254"
NO_CREDENTIALS = "give credentials (AWS_ACCESS_KEY_ID and so on), or AWS_SKIP_SIGNATURE=true for a public bucket"
EXPIRED = "the credentials have expired: renew them, then run the same command again"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNRESOLVED = re.compile(  # as glibc, macOS, Windows, urllib3 and Rust's libraries say it
    "Name or service not known|Temporary failure in name resolution|No address associated with hostname|"
    "nodename nor servname|getaddrinfo failed|NameResolutionError|failed to lookup address|dns error",
    re.IGNORECASE,
)
log = logging.getLogger(__name__)


class Stopped(RunError):
    """A read was given up because the run had ended."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where}: given up, since the run has ended", "run the same command again")


class StatusError(Exception):
    """An answer with a status that is not the one wanted; `after` are the seconds that the server asks to wait."""

    speaks = True

    def __init__(self, status: int, words: str = "", after: float | None = None, again: bool | None = None) -> None:
        super().__init__(f"status {status}{words and f': {words}'}")
        self.status, self.after = status, after
        self.again = status in AGAIN if again is None else again


class BrokenAnswer(Exception):
    """An answer that broke off or held something else than was asked for; worth another try."""

    speaks = True


class Final(RunError):
    """An answer that no further try will better."""


@dataclass(frozen=True)
class Fault:
    """What became of a try: whether another is worth it, after how many seconds at least, and what helps."""

    again: bool
    after: float | None
    remedy: str


def fault_of(error: BaseException) -> Fault:
    """What to do about an error of any library that talks to a server."""
    if METADATA_HOST in str(error):  # asked for the machine's own role, as no other credentials were found
        return Fault(False, None, NO_CREDENTIALS)
    status = status_of(error)
    after = getattr(error, "after", None) or retry_after(getattr(getattr(error, "response", None), "headers", {}))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return Fault(False, None, "free some space there")
    if status is not None:
        return Fault(getattr(error, "again", status in AGAIN), after, told(str(error)) or _remedy(status))
    if any(cls.__name__ in NEVER_NAMES for cls in type(error).__mro__) or isinstance(error, NEVER):
        return Fault(False, None, told(str(error)) or _remedy(None, str(error)))
    if not isinstance(error, Exception):
        return Fault(False, None, "")
    return Fault(True, after, _remedy(None, str(error)))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` (or the Hub's `RateLimit`) asks to wait."""
    found = {name.lower(): value for name, value in headers.items()}
    if match := re.fullmatch(r"\s*(\d{1,5})\s*", found.get("retry-after", "")):
        return float(match[1])
    if match := re.search(r"\br=0;\s*t=(\d{1,5})\b", found.get("ratelimit", "")):
        return float(match[1])
    return None


class Line:
    """The way to one place. `stop` ends what is under way."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def stop(self) -> None:
        """Let every call under way and to come raise `Stopped`."""
        self.stopped.set()

    def call(self, where: str, request: Callable[[], T], tries: int = OPENING) -> T:
        """The answer of a request, which is tried again as long as that may help.

        Raises:
            RunError: it failed for good; Stopped: it was given up.
        """
        return self.all(where, [lambda: self.patiently(where, request, tries)])[0]

    def all(self, where: str, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What all calls return, `LANES` of them side by side; the first that raises ends it."""
        answers: dict[int, T] = {}
        failures: list[BaseException] = []
        left, lock, ended = iter(enumerate(calls)), threading.Lock(), threading.Semaphore(0)

        def work() -> None:
            try:
                while not failures and not self.stopped.is_set():
                    with lock:
                        index, call = next(left, (-1, None))
                    if call is None:
                        break
                    answers[index] = call()
            except BaseException as error:
                failures.append(error)
            finally:
                ended.release()

        lanes = min(LANES, len(calls))
        try:
            for _ in range(lanes):
                threading.Thread(target=work, name="lane", daemon=True).start()
            for _ in range(lanes):
                while not ended.acquire(timeout=POLL):
                    if self.stopped.is_set():
                        raise Stopped(where)
                if failures:
                    raise failures[0]
        except Exception:
            raise
        except BaseException:  # a signal
            self.stop()
            raise
        if self.stopped.is_set() and len(answers) < len(calls):
            raise Stopped(where)
        return [answers[index] for index in range(len(calls))]

    def patiently(self, where: str, request: Callable[[], T], tries: int, progress: Callable[[], int] = lambda: 0) -> T:
        """Try until it succeeds; for use inside of the calls of `all`.

        Each time that `progress` has grown, the count of tries starts anew.
        """
        tried, before = 0, progress()
        while True:
            try:
                return request()
            except SafeshardError:
                raise
            except BaseException as error:
                fault = fault_of(error)
                tried, before = (0 if progress() > before else tried) + 1, progress()
                wait = min(FIRST_WAIT * 2.0 ** (tried - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
                most = UNRESOLVED if tries <= OPENING and is_unresolved(error) else tries
                if not fault.again or tried >= most or (fault.after or 0.0) > LONGEST_ASKED:
                    times = f", {tried} times" if tried > 1 else ""
                    raise Final(f"{where}: {reason(error)}{times}", fault.remedy) from error
                wait = max(fault.after or 0.0, wait)
                log.warning("%s: %s; another try in %.1f s", where, reason(error), wait)
                if self.stopped.wait(wait):
                    raise Stopped(where) from error


def is_unresolved(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is that a server's name has no address."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, socket.gaierror) or _UNRESOLVED.search(str(error)):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about, wherever its library keeps it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 300 <= value < 600:
                return value
    response = getattr(error, "response", None)  # botocore's
    if isinstance(response, Mapping):
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    match = re.search(r"non-2xx status code: (\d{3})", str(error))  # obstore's
    return int(match[1]) if match else None


def told(words: str) -> str | None:
    """What helps where a store's own words say more than its status, which is that of many other refusals."""
    flat = words.lower().replace("_", "")
    if "requesttimetooskewed" in flat or "date header too old" in flat:  # S3's and Google's word, and Azure's
        return "this machine's clock is wrong: set it, then run the same command again"
    return EXPIRED if "expiredtoken" in flat else None


def _remedy(status: int | None, words: str = "") -> str:
    words = without_secrets(words)
    if status == 401:
        return "log in: `hf auth login` or HF_TOKEN for the Hub, the cloud's own credentials for a bucket"
    if status == 403:
        return "ask for access: accept the terms on the model's page, or use credentials that may read it"
    if status == 407 or "proxy" in words.lower():
        return "correct the proxy (HTTPS_PROXY, NO_PROXY)"
    if status in (404, 410):
        return "check the name; it may have been removed or renamed"
    if status == 412:
        return "run the same command again once the file is at rest"
    if status == 416:
        return "the file was replaced by a shorter one: run again once it is at rest"
    if status == 429:
        return "the server limits requests: run the same command again later, or log in"
    if status is not None and status >= 500:
        return "the server is in trouble: run the same command again later"
    if "credential" in words.lower():
        return NO_CREDENTIALS
    if "CERTIFICATE" in words.upper():
        return "let Python trust the certificate (SSL_CERT_FILE), or correct the clock"
    return "check the network, then run the same command again"
