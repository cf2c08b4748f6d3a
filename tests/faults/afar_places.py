"""Places afar that outlive whoever writes there: the stand-in bucket and the stand-in Hub, and strikes at a request."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from harness import told
from stand_in_bucket import Asked, StandinBucket, Trouble
from stand_in_hub import Fault, Request, StandinHub

OUT = "out/"  # the prefix of the bucket below which outputs lie
KINDS = ("killed before", "killed after", "not done", "not answered")  # what becomes of the request that is struck


@dataclass
class Strike:
    """What becomes of the request number `at`. Whoever asks is killed just before it is done, or just after; or is
    left alive, without an answer, and the request is done or is not."""

    kind: str
    at: int
    pid: Path  # the file that tells whom to kill
    asked: list[str] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    @property
    def kills(self) -> bool:
        return self.kind.startswith("killed")

    @property
    def done(self) -> bool:
        return self.kind in ("killed after", "not answered")

    def hits(self, what: str) -> bool:
        """Count a request; whether it is the one. Kills at once where the request is not to be done."""
        with self._lock:
            self.asked.append(what)
            hit = len(self.asked) - 1 == self.at
        if hit and not self.done:
            self.end()
        return hit

    def end(self) -> None:
        """Kill, where that is due, and wait until it is dead."""
        if self.kills:
            process = int(self.pid.read_text())
            deadline = time.monotonic() + 60
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < deadline:
                    os.kill(process, signal.SIGKILL)
                    time.sleep(0.001)


class Place(Protocol):
    """A stand-in, and what lies there."""

    def outputs(self) -> dict[str, dict[str, Any]]:
        """All that lies there: each output's files, as `told` leaves them."""

    def keep(self) -> Callable[[], None]:
        """Returns what brings back all that lies there now."""

    def strike(self, strike: Strike | None) -> None:
        """Let this become of the requests to come."""

    def settle(self) -> None:
        """Wait until what is under way is done."""

    def left(self) -> int:
        """How much lies there that nothing shows and somebody pays for."""


class Bucket:
    """Outputs below `OUT`."""

    def __init__(self, bucket: StandinBucket) -> None:
        self._bucket = bucket

    def outputs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, (data, _) in self._bucket.objects().items():
            output, _, file = name.removeprefix(OUT).partition("/")
            found[output][file] = data
        return {output: told(files) for output, files in found.items()}

    def keep(self) -> Callable[[], None]:
        objects = self._bucket.objects()
        return lambda: self._bucket.restore(objects)

    def strike(self, strike: Strike | None) -> None:
        def trouble(asked: Asked) -> Trouble | None:
            if strike is None or not strike.hits(f"{asked.method} {asked.path}"):
                return None
            return Trouble(kind="lost", then=strike.end) if strike.done else Trouble(kind="reset")

        self._bucket.striking = trouble

    def settle(self) -> None:
        _until(lambda: not self._bucket.under_way)

    def left(self) -> int:
        return self._bucket.unfinished()


class Hub:
    """Repositories; an output is the head of one."""

    def __init__(self, hub: StandinHub) -> None:
        self._hub = hub

    def outputs(self) -> dict[str, dict[str, Any]]:
        return {repo: told(self._hub.content(repo)) for repo in self._hub._commits if self._hub.content(repo)}

    def keep(self) -> Callable[[], None]:
        hub = self._hub
        commits = {repo: dict(each) for repo, each in hub._commits.items()}
        branches, private = dict(hub._branches), dict(hub.writes.private)
        objects = {path.name for path in hub.writes.folder.iterdir()}

        def bring_back() -> None:
            hub._commits = {repo: dict(each) for repo, each in commits.items()}
            hub._branches, hub.writes.private = dict(branches), dict(private)
            for path in hub.writes.folder.iterdir():
                if path.name not in objects:
                    path.unlink()

        return bring_back

    def strike(self, strike: Strike | None) -> None:
        def fault(request: Request) -> Fault | None:
            if strike is None or not strike.hits(f"{request.method} {request.path}"):
                return None
            if strike.done and re.fullmatch("GET|HEAD", request.method):  # it has no effect
                strike.end()
            elif strike.done:
                return Fault("", "lost", then=strike.end)
            return Fault("", "hangup")

        self._hub.striking = fault

    def settle(self) -> None:
        _until(lambda: not self._hub.busy)

    def left(self) -> int:
        return 0


def _until(holds: Callable[[], bool]) -> None:
    """Wait until it holds, and goes on to: what the dead have sent may not have been looked at yet."""
    deadline, in_a_row = time.monotonic() + 60, 0
    while in_a_row < 5:
        in_a_row = in_a_row + 1 if holds() else 0
        assert time.monotonic() < deadline
        time.sleep(0.002)
