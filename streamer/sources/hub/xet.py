"""Byte ranges from the Hub's content-addressed storage, through hf-xet: it asks for chunks in parallel by itself.

It checks no hashes of ranges (a flipped bit in a store passes), so what came counts as "ranges", as over HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import reason
from safeshard.streamer.sources.http import read_body, request, status_words
from safeshard.streamer.sources.remote import BrokenAnswer, Final, Line, StatusError, Stopped, retry_after

LEAST_BYTES = 4 << 20  # of a read: a chunk has about 64 KiB, of which the ends of a range are thrown away
BUFFERS = {  # bytes that the library may hold, for all streams together
    "reconstruction.min_reconstruction_fetch_size": 16 << 20,
    "reconstruction.min_prefetch_buffer": 32 << 20,
    "reconstruction.download_buffer_size": 64 << 20,
    "reconstruction.download_buffer_perfile_size": 32 << 20,
    "reconstruction.download_buffer_limit": 256 << 20,
    "telemetry.enabled": False,
}
TRIES = 3  # before ranges go over HTTP
log = logging.getLogger(__name__)


class XetRanges:
    """Ranges of one commit's files. After a failure it is not used again: the same bytes come over HTTP."""

    def __init__(self, repo: str, commit: str, headers: Mapping[str, str]) -> None:
        from huggingface_hub import constants

        self._repo, self._headers = repo, dict(headers)
        self._token_url = f"{constants.ENDPOINT}/api/models/{repo}/xet-read-token/{commit}"
        self._usable = not getattr(constants, "HF_HUB_DISABLE_XET", True) and _session() is not None
        self._lock = threading.Lock()
        self._group: Any = None
        self.hashes: dict[str, str] = {}  # by file, as the Hub's answers name them

    def readinto(self, line: Line, name: str, size: int, offset: int, view: memoryview) -> bool:
        """Fill `view`; False where this storage does not serve the file, or not at present."""
        if not self._usable or len(view) < LEAST_BYTES or name not in self.hashes:
            return False
        position = 0

        def attempt() -> None:
            nonlocal position
            import hf_xet

            info = hf_xet.XetFileInfo(self.hashes[name], size)
            stream = self._streams(line).download_stream(info, start=offset + position, end=offset + len(view))
            for chunk in stream:
                if line.stopped.is_set():
                    stream.cancel()
                    raise Stopped(name)
                if position + len(chunk) > len(view):
                    raise Final(f"{name}: more bytes came than were asked for")
                view[position : position + len(chunk)] = chunk
                position += len(chunk)
            if position < len(view):
                raise BrokenAnswer(f"the stream ended after {position} of {len(view)} bytes")

        where = f"{self._repo}/{name}"
        try:
            line.all(where, [lambda: line.patiently(where, attempt, TRIES, lambda: position)])
        except Stopped:
            raise
        except RunError as error:
            log.warning("%s; its ranges are read over HTTP", reason(error))
            self._usable = False
            return False
        return True

    def _streams(self, line: Line) -> Any:
        with self._lock:
            if self._group is None:
                with request("GET", self._token_url, self._headers) as answer:
                    if answer.status != 200:
                        raise StatusError(answer.status, status_words(answer), retry_after(answer.headers))
                    read_body(answer)
                    head = answer.headers
                session = _session()
                assert session is not None
                self._group = session.new_download_stream_group(
                    endpoint=head["X-Xet-Cas-Url"],
                    token=head["X-Xet-Access-Token"],
                    token_expiry_unix_secs=int(head["X-Xet-Token-Expiration"]),
                    token_refresh_url=self._token_url,
                    token_refresh_headers=self._headers,
                    custom_headers={k: v for k, v in self._headers.items() if k.lower() != "authorization"},
                )
            return self._group


@cache
def _session() -> Any:
    """hf-xet's runtime, with small buffers; None where there is none that serves ranges."""
    try:
        import hf_xet

        return hf_xet.XetSession(hf_xet.XetConfig().with_config(BUFFERS))
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # absent, or older than 1.6
        log.debug("ranges come over HTTP: %s", reason(error))
        return None
