"""Byte ranges over HTTP, through huggingface_hub's session: its proxies, certificates and redirects are the user's.

An answer is taken only if it is the range that was asked for, and never more of it than that.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from safeshard.manifests.errors import without_secrets
from safeshard.streamer.sources.remote import UNDERWAY, BrokenAnswer, Final, Line, StatusError, Stopped, retry_after

TIMEOUT = 30.0  # seconds without a byte
SLOW_SECONDS, SLOW_BYTES = 30.0, 64 << 10  # fewer bytes in that time: another connection is tried
CHUNK = 1 << 18
PIECE = 8 << 20  # bytes of one request
MAX_BODY = 64 << 20  # of an answer that is read whole


class _WithoutSecrets(logging.Filter):
    """Leaves signatures and passwords out of what HTTP clients log of their requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


for _client in ("httpx", "httpx2", "urllib3.connectionpool", "huggingface_hub.utils._http"):
    logging.getLogger(_client).addFilter(_WithoutSecrets())


@dataclass(frozen=True)
class Answer:
    """An answer: `first` is the head of the redirect that led to it, `body` yields its bytes as they come."""

    status: int
    headers: Mapping[str, str]
    url: str
    first: Mapping[str, str] | None
    body: Callable[[], Iterator[bytes]] = field(repr=False)


@contextmanager
def request(method: str, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
    """Send a request, following redirects; credentials do not follow to another host."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()  # httpx's or, before huggingface_hub 1.0, that of requests
    sent = dict(headers) | {"Accept-Encoding": "identity"}
    if callable(getattr(session, "stream", None)):  # requests has a setting of this name
        with session.stream(method, url, headers=sent, timeout=TIMEOUT, follow_redirects=True) as response:
            first = response.history[0].headers if response.history else None
            yield Answer(response.status_code, response.headers, str(response.url), first, response.iter_raw)
    else:
        with session.request(method, url, headers=sent, timeout=TIMEOUT, stream=True, allow_redirects=True) as response:
            first = response.history[0].headers if response.history else None
            body = partial(response.raw.stream, CHUNK, decode_content=False)
            yield Answer(response.status_code, response.headers, response.url, first, body)


@dataclass
class Target:
    """A file on a server. `direct` is where redirects led to last: signed URLs serve many requests.

    `etag` is sent as If-Match. `check` looks at an answer's head, and raises where it is about another file.
    """

    where: str
    url: str
    size: int
    headers: Mapping[str, str]
    etag: str | None = None
    check: Callable[[Answer], None] = lambda answer: None
    direct: str | None = None

    def fill(self, line: Line, start: int, view: memoryview, tries: int = UNDERWAY) -> None:
        """Fill `view` with the bytes from `start` on, in pieces side by side."""
        pieces = [(start + begin, view[begin : begin + PIECE]) for begin in range(0, len(view), PIECE)]
        line.all(self.where, [partial(self._piece, line, tries, begin, part) for begin, part in pieces])

    def whole(self, line: Line, tries: int = UNDERWAY) -> bytes:
        """All of a small file."""
        buffer = bytearray(self.size)
        self.fill(line, 0, memoryview(buffer), tries)
        return bytes(buffer)

    def _piece(self, line: Line, tries: int, start: int, view: memoryview) -> None:
        position = 0

        def attempt() -> None:
            nonlocal position
            for received in self._received(start + position, start + len(view)):
                if line.stopped.is_set():
                    raise Stopped(self.where)
                view[position : position + len(received)] = received
                position += len(received)
            if position < len(view):
                raise BrokenAnswer(f"the answer ended at byte {start + position} of {start + len(view)}")

        line.patiently(self.where, attempt, tries, lambda: position)

    def _received(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) as they come, or fewer where the connection ends."""
        headers = {"Range": f"bytes={start}-{stop - 1}"} | ({"If-Match": self.etag} if self.etag else {})
        url, direct = self.direct or self.url, self.direct is not None
        if not direct:
            headers = dict(self.headers) | headers
        with request("GET", url, headers) as answer:
            if direct and answer.status in (400, 401, 403, 404, 410):  # a signed URL has run out
                self.direct = None
                raise StatusError(answer.status, "a signed URL has run out", again=True)
            self._accept(answer, start, stop)
            if urlsplit(answer.url)[:2] != urlsplit(url)[:2]:
                self.direct = answer.url
            yield from _measured(answer.body(), stop - start)

    def _accept(self, answer: Answer, start: int, stop: int) -> None:
        """Raise unless an answer is the range [start, stop) of the file."""
        if answer.status in (401, 403) and answer.first is not None:  # a URL that was signed just now
            problem = f"{self.where}: the storage host refuses what the server signed (status {answer.status})"
            raise Final(problem, "check the proxy and the clock, then run the same command again")
        if answer.status >= 300:
            raise StatusError(answer.status, status_words(answer), retry_after(answer.headers))
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise Final(f"{self.where}: the server compresses ranges", "use another server or mirror")
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start or int(match[2]) >= stop:
                raise BrokenAnswer(f"another range than bytes {start} to {stop - 1}")
            if match[3] not in ("*", str(self.size)):
                problem = f"{self.where}: has {match[3]} bytes, {self.size} expected: it changed while it was read"
                raise Final(problem, "run the same command again once the file is at rest")
        elif "text/html" in answer.headers.get("Content-Type", "") and not self.url.endswith(".html"):
            raise Final(f"{self.where}: a web page came in its place", "log in to the network or proxy first")
        elif (start, stop) != (0, self.size) or answer.status != 200:
            problem = f"{self.where}: the server ignores byte ranges (status {answer.status})"
            raise Final(problem, "use a server or mirror that serves ranges")
        self.check(answer)


def status_words(answer: Answer) -> str:
    """What a server says beside a status."""
    return answer.headers.get("X-Error-Message") or answer.headers.get("X-Error-Code") or ""


def read_body(answer: Answer) -> bytes:
    """A whole answer, of at most MAX_BODY bytes."""
    body = bytearray()
    for chunk in _measured(answer.body(), MAX_BODY):
        body += chunk
    return bytes(body)


def _measured(body: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """At most `limit` bytes of a body; raises where it trickles."""
    mark, since, left = time.monotonic(), 0, limit
    for chunk in body:
        yield chunk[:left]
        if len(chunk) > left:
            raise Final("more bytes came than were asked for", "use another server or mirror")
        left, since = left - len(chunk), since + len(chunk)
        if (now := time.monotonic()) - mark > SLOW_SECONDS:
            if since < SLOW_BYTES:
                raise BrokenAnswer(f"{since} bytes in {now - mark:.0f} s")
            mark, since = now, 0
