"""What every source shares."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from safeshard.streamer.sources.base import Source, in_parallel


class _Stalled:
    """A source afar, of which every read stalls until it is given up."""

    far = True

    def __init__(self) -> None:
        self.given_up = threading.Event()

    def stop(self) -> None:
        self.given_up.set()


def test_a_signal_waits_for_no_stalled_read() -> None:
    source = _Stalled()
    waited: list[int] = []

    def read(item: int) -> None:
        if item == 0:
            raise KeyboardInterrupt
        if not source.given_up.wait(30):
            waited.append(item)

    with pytest.raises(KeyboardInterrupt):
        in_parallel(cast(Source, source), read, range(3))
    assert not waited
