"""What becomes of faults on the way: the table of docs/remote.md, a row a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoint import SHARDS, one_line, read_weight, weight
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.sources import http, open_source, remote
from safeshard.streamer.sources.remote import Line, fault_of, retry_after

SHARD = rf"/cdn/.*{SHARDS[0]}"
AGAIN = [408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529]
FINAL = {400: "status 400", 404: "check the name", 410: "check the name", 412: "at rest", 416: "replaced by a shorter"}


@pytest.fixture
def checkpoint(hub: StandinHub) -> Checkpoint:
    """Opened, so that what follows meets readers."""
    opened = open_checkpoint(open_source("org/name"))
    hub.taken()
    return opened


class TestStatus:
    @pytest.mark.parametrize("status", AGAIN)
    def test_passing_ones_are_tried_again(self, hub: StandinHub, checkpoint: Checkpoint, status: int) -> None:
        hub.fail(SHARD, status=status, times=3)
        assert read_weight(checkpoint, 0) == weight(0)
        assert [r.status for r in hub.taken()] == [status] * 3 + [206]

    @pytest.mark.parametrize("status", AGAIN)
    def test_lasting_ones_end_the_run(
        self, hub: StandinHub, checkpoint: Checkpoint, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "LONGEST_WAIT", 0.0)
        hub.fail(SHARD, status=status)
        with pytest.raises(RunError, match=f"{SHARDS[0]}: .*status {status}, 24 times") as error:
            read_weight(checkpoint, 0)
        assert "run the same command again" in one_line(error)

    @pytest.mark.parametrize("status", FINAL)
    def test_others_are_final(self, hub: StandinHub, checkpoint: Checkpoint, status: int) -> None:
        hub.signed.clear()
        hub.fail(r"/resolve/", status=status)
        with pytest.raises(RunError, match=FINAL[status]) as error:
            read_weight(checkpoint, 0)
        assert one_line(error).startswith(f"org/name/{SHARDS[0]}: ")
        assert len(hub.taken()) <= 2  # the signed URL that had run out, and the answer

    @pytest.mark.parametrize("status", [500, 429])
    def test_opening_too(self, hub: StandinHub, status: int) -> None:
        hub.fail("/api/models/", status=status, times=2)
        hub.fail("/resolve/.*config.json", status=status, times=2)
        assert "config.json" in open_source("org/name").sizes()

    def test_the_storage_host_refuses(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        """Not a signature that has run out: a fresh one is refused too."""
        hub.fail("/cdn/", status=403)
        with pytest.raises(RunError, match=r"storage host refuses.*clock"):
            read_weight(checkpoint, 0)

    def test_retry_after_is_kept_to(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        hub.fail(SHARD, status=429, headers={"Retry-After": "1"}, times=1)
        started = time.monotonic()
        assert read_weight(checkpoint, 0) == weight(0)
        assert time.monotonic() - started >= 1.0

    def test_an_hour_is_not_waited_for(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        hub.fail(SHARD, status=503, headers={"Retry-After": "3600"})
        with pytest.raises(RunError, match="status 503"):
            read_weight(checkpoint, 0)
        assert len(hub.taken()) == 1

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"Retry-After": "7"}, 7.0), ({"RateLimit": '"resolvers";r=0;t=55'}, 55.0),
            ({"RateLimit": '"resolvers";r=9;t=55'}, None), ({"Retry-After": "soon"}, None), ({}, None),
        ],
    )  # fmt: skip
    def test_what_servers_ask_for(self, headers: dict[str, str], seconds: float | None) -> None:
        assert retry_after(headers) == seconds


class TestBodies:
    @pytest.mark.parametrize("kind", ["reset", "truncate", "shorter"])
    @pytest.mark.parametrize("after", [0, 1, 3000, 5999])
    def test_what_breaks_off_is_gone_on_with(
        self, hub: StandinHub, checkpoint: Checkpoint, kind: str, after: int
    ) -> None:
        hub.fail(SHARD, kind, after=after, times=2)
        assert read_weight(checkpoint, 0) == weight(0)
        if kind == "truncate":  # a reset takes along what had come
            starts = [int((r.range or "").partition("=")[2].partition("-")[0]) for r in hub.taken()]
            assert starts[0] + 2 * after >= starts[-1] >= starts[0] + after  # what had come is not asked for again

    def test_many_breaks_are_survived_as_long_as_bytes_come(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        hub.fail(SHARD, "truncate", after=100, times=50)
        assert read_weight(checkpoint, 0) == weight(0)

    @pytest.mark.parametrize("kind", ["stall", "slow"])
    def test_what_trickles_is_left(
        self, hub: StandinHub, checkpoint: Checkpoint, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http, "TIMEOUT", 1.5)
        monkeypatch.setattr(http, "SLOW_SECONDS", 1.0)
        hub.fail(SHARD, kind, after=10, times=1)
        assert read_weight(checkpoint, 0) == weight(0)

    def test_another_range(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        hub.fail(SHARD, "elsewhere", times=1)
        assert read_weight(checkpoint, 0) == weight(0)

    def test_ranges_that_are_ignored(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        """The whole shard is not read for the sake of a part of it."""
        hub.fail(SHARD, "ignore_range")
        with pytest.raises(RunError, match=r"ignores byte ranges.*mirror"):
            read_weight(checkpoint, 0)

    def test_a_web_page_in_its_place(self, hub: StandinHub, checkpoint: Checkpoint) -> None:
        hub.fail(SHARD, "html")
        with pytest.raises(RunError, match=r"a web page came in its place.*log in to the network"):
            read_weight(checkpoint, 0)

    def test_a_small_file_that_is_not_what_the_hub_states(self, hub: StandinHub) -> None:
        hub.fail("config.json", "flip", after=3)
        with pytest.raises(RequestError, match=r"config\.json: what came is not what the Hub states of it \(git "):
            open_source("org/name")

    def test_an_adapter_that_is_not_what_the_hub_states(self, hub: StandinHub, world: object) -> None:
        hub.add("org/adapter", world.adapter("adapter", world.llama()))  # type: ignore[attr-defined]
        hub.fail("/cdn/", "flip", after=2000)
        with pytest.raises(RunError, match=r"not what the Hub states of it \(sha256 "):
            open_source("org/adapter").readinto("adapter_model.safetensors", 500, memoryview(bytearray(8)))

    def test_another_file_under_its_name(self, hub: StandinHub, checkpoint: Checkpoint, folder: Path) -> None:
        """A mirror whose copy is another commit's."""
        other = hub.add("org/name", folder / ".." / "checkpoint")
        assert other == checkpoint.source.revision
        hub.signed.clear()
        headers = {"X-Repo-Commit": "f" * 40, "Content-Range": "bytes 0-0/1"}
        hub.fail(f"/resolve/.*{SHARDS[0]}", status=206, headers=headers, body=b"x")
        with pytest.raises(RunError, match=r"another range|another file|it changed"):
            read_weight(checkpoint, 0)


class TestStopping:
    @pytest.mark.parametrize("kind", ["stall", "slow", "status"])
    def test_a_stop_is_noticed_at_once(
        self, hub: StandinHub, checkpoint: Checkpoint, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "FIRST_WAIT", 60.0)
        monkeypatch.setattr(remote, "LONGEST_WAIT", 60.0)
        hub.fail(SHARD, kind, after=10)
        threading.Timer(0.3, checkpoint.source.stop).start()
        started = time.monotonic()
        with pytest.raises(RunError, match="given up, since the run has ended"):
            read_weight(checkpoint, 0)
        assert time.monotonic() - started < 2.0
        with pytest.raises(RunError, match="given up"):  # nor does it begin anew
            read_weight(checkpoint, 1)

    def test_an_interrupt_of_the_caller(self) -> None:
        """What a signal raises in the waiting thread passes, and ends the other requests."""
        line, begun = Line(), threading.Event()

        class Interrupt(BaseException):
            pass

        def interrupt() -> None:
            raise Interrupt

        def wait() -> None:
            begun.set()
            line.stopped.wait(30)

        calls: list[Callable[[], None]] = [wait, interrupt]
        with pytest.raises(Interrupt):
            line.all("there", calls)
        assert line.stopped.is_set()

    def test_the_first_failure_is_raised_without_waiting_for_the_rest(self) -> None:
        line = Line()

        def fail() -> None:
            raise RunError("no")

        started = time.monotonic()
        with pytest.raises(RunError, match="no"):
            line.all("there", [fail, lambda: time.sleep(5)])
        assert time.monotonic() - started < 2.0


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError("reset"), True), (TimeoutError(), True), (OSError("odd"), True),
        (FileNotFoundError("x"), False), (PermissionError("x"), False), (OSError(28, "No space left on device"), False),
        (ValueError("x"), False), (ImportError("x"), False), (KeyboardInterrupt(), False), (RuntimeError("x"), True),
    ],
)  # fmt: skip
def test_which_errors_are_worth_another_try(error: BaseException, again: bool) -> None:
    assert fault_of(error).again == again
