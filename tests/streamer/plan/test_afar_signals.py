"""A signal while places afar are looked at ends the looking, however long their answers would take."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from safeshard.streamer.plan.written import afar


class _Places:
    """Stores of which one meets the signal, and the others answer only once they are given up."""

    def __init__(self) -> None:
        self.waited: list[str] = []

    def open(self, url: str) -> Any:
        given_up = threading.Event()

        def names() -> dict[str, Any]:
            if url.endswith("0"):
                raise KeyboardInterrupt
            if not given_up.wait(30):
                self.waited.append(url)
            return {}

        return SimpleNamespace(spec=url, names=names, stop=given_up.set)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> _Places:
    places = _Places()
    monkeypatch.setattr(afar, "open_store", places.open)
    return places


def test_a_signal_waits_for_no_stalled_place(places: _Places) -> None:
    with pytest.raises(KeyboardInterrupt):
        afar.look_at(f"s3://b/{n}" for n in range(3))
    assert not places.waited


def test_a_signal_waits_for_no_stalled_place_of_finished_jobs(places: _Places) -> None:
    jobs: Any = [SimpleNamespace(output=f"s3://b/{n}", afar=f"s3://b/{n}") for n in range(3)]
    with pytest.raises(KeyboardInterrupt):
        afar.without_finished(jobs)
    assert not places.waited
