"""Outputs in a bucket that are interrupted, disturbed, or met by another run: the rows of docs/remote.md."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from bucket_outputs import OUT, fault, files, full, local_files, same
from stand_in_bucket import Asked, StandinBucket, Trouble

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import resta, verify
from safeshard.streamer.plan.ours import JOURNAL_MAGIC
from safeshard.streamer.sources import remote
from safeshard.streamer.sources.stores import bucket as bucket_store

__all__ = ["full"]


class TestResume:
    def test_after_a_failure(self, bucket: StandinBucket, full: dict[str, Any], world: Any) -> None:
        """Nothing looks finished; what lies there is not brought again."""
        resta(**full, output=world.root / "local")
        once = fault(bucket, "model-00003", Trouble(403, "AccessDenied"))
        with pytest.raises(RunError, match=r"use credentials that may write there, then run the same command again"):
            resta(**full, output=OUT)
        assert once.count == 1
        assert "manifest.json" not in bucket.names("out/x")
        bucket.taken()
        resta(**full, output=OUT)
        assert _puts(bucket, "model-") == ["model-00003-of-00003.safetensors"]
        assert same(files(bucket), local_files(world.root / "local"))

    def test_on_another_machine(self, bucket: StandinBucket, full: dict[str, Any], world: Any, work: Path) -> None:
        """By the journal that is kept there."""
        resta(**full, output=world.root / "local")
        fault(bucket, "model-00003", Trouble(403, "AccessDenied"))
        with pytest.raises(RunError):
            resta(**full, output=OUT)
        shutil.rmtree(work)
        bucket.taken()
        resta(**full, output=OUT)
        assert _puts(bucket, "model-") == ["model-00003-of-00003.safetensors"]
        assert same(files(bucket), local_files(world.root / "local"))

    @pytest.mark.parametrize("damage", ["gone", "another"])
    def test_what_changed_there_is_brought_again(
        self, bucket: StandinBucket, full: dict[str, Any], world: Any, damage: str
    ) -> None:
        resta(**full, output=world.root / "local")
        fault(bucket, "model-00003", Trouble(403, "AccessDenied"))
        with pytest.raises(RunError):
            resta(**full, output=OUT)
        key = "out/x/model-00001-of-00003.safetensors"
        bucket.delete(key) if damage == "gone" else bucket.put(key, b"?" * len(bucket.get(key)))
        resta(**full, output=OUT)
        assert same(files(bucket), local_files(world.root / "local"))

    def test_another_request(self, bucket: StandinBucket, full: dict[str, Any], work: Path) -> None:
        fault(bucket, "model-00003", Trouble(403, "AccessDenied"))
        with pytest.raises(RunError):
            resta(**full, output=OUT)
        shutil.rmtree(work)
        with pytest.raises(RequestError, match=r"options.gamma.*another request; --overwrite starts anew"):
            resta(**full, output=OUT, gamma=0.5)
        resta(**full, output=OUT, gamma=0.5, overwrite=True)
        assert b'"gamma": 0.5' in bucket.get("out/x/manifest.json")

    def test_inputs_that_changed_leave_nothing(self, bucket: StandinBucket, full: dict[str, Any], work: Path) -> None:
        def writing(asked: Asked) -> None:
            if "model-00001" in asked.path:
                (full["finetuned"] / "model-00001-of-00003.safetensors").touch()

        bucket.writing = writing
        with pytest.raises(RunError, match=r"changed while it was read"):
            resta(**full, output=OUT)
        assert bucket.names("out/x") == {}
        assert list(work.iterdir()) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("at", ["model-00002-of-00003.safetensors", "manifest.json", "DELETE"])
    def test_killed(self, bucket: StandinBucket, full: dict[str, Any], world: Any, at: str, python: str) -> None:
        """kill -9 while a shard, the manifest, or the journal's removal is under way."""
        resta(**full, output=world.root / "local")
        words = [f"--{k}={v}" for k, v in full.items() if k != "quiet"]
        command = [python, "-m", "safeshard", "resta", *words, f"--output={OUT}", "--quiet"]
        child: list[forked.Started] = []

        def writing(asked: Asked) -> Trouble | None:
            if child and (
                asked.path.endswith(at) or (at == "DELETE" and asked.method == "POST" and "x/" not in asked.path)
            ):
                child[0].kill()
                child[0].wait()
                child.clear()
                return Trouble(kind="lost" if at == "manifest.json" else "reset")
            return None

        bucket.writing = writing
        with forked.Started(command) as process:
            child.append(process)
            assert process.wait(120) == -9
        assert ("manifest.json" in bucket.names("out/x")) == (at != "model-00002-of-00003.safetensors")
        assert "journal.jsonl" in bucket.names("out/x")
        subprocess.run(command, check=True, timeout=120)
        assert same(files(bucket), local_files(world.root / "local"))


def _puts(bucket: StandinBucket, match: str) -> list[str]:
    return [a.path.rpartition("/")[2] for a in bucket.taken() if a.method == "PUT" and match in a.path]


class TestFaults:
    """Each row of the table of writes in docs/remote.md that is about buckets."""

    @pytest.mark.parametrize(
        ("name", "status"), [("journal.jsonl", 500), ("model-00002", 503), ("config.json", 429), ("manifest.json", 503)]
    )
    def test_passing_ones(
        self, bucket: StandinBucket, full: dict[str, Any], world: Any, name: str, status: int
    ) -> None:
        once = fault(bucket, name, Trouble(status, "SlowDown"), times=2)
        resta(**full, output=OUT)
        assert once.count == 2
        assert not verify(OUT)

    @pytest.mark.parametrize("kind", ["reset", "lost"])
    @pytest.mark.parametrize("name", ["journal.jsonl", "model-00002", "manifest.json"])
    def test_answers_that_do_not_come(
        self, bucket: StandinBucket, full: dict[str, Any], world: Any, name: str, kind: Any
    ) -> None:
        """A put on condition, done without an answer, is found again and is no conflict."""
        once = fault(bucket, name, Trouble(kind=kind))
        resta(**full, output=OUT)
        assert once.count == 1
        assert not verify(OUT)

    def test_an_upload_in_parts_that_was_completed_without_an_answer(
        self, bucket: StandinBucket, full: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bucket_store, "PART", 5 << 10)
        monkeypatch.setattr(bucket_store, "PART_RETRIES", 0)
        completed: list[Asked] = []

        def writing(asked: Asked) -> Trouble | None:
            if asked.method == "POST" and "model-00002" in asked.path:
                completed.append(asked)
                return Trouble(kind="lost") if len(completed) == 2 else None
            return None

        bucket.writing = writing
        resta(**full, output=OUT)
        assert len(completed) == 4  # begun and completed, twice
        assert not verify(OUT)

    @pytest.mark.parametrize(
        ("name", "trouble", "words"),
        [
            ("journal.jsonl", Trouble(403, "AccessDenied"), "use credentials that may write there"),
            ("manifest.json", Trouble(400, "ExpiredToken"), "the credentials have expired: renew them"),
            ("journal.jsonl", Trouble(401, "Unauthorized"), "log in: .*the cloud's own credentials"),
            ("model-00002", Trouble(403, "RequestTimeTooSkewed"), "this machine's clock is wrong: set it"),
            ("config.json", Trouble(429, "SlowDown"), "the server limits requests"),
            ("manifest.json", Trouble(503, "SlowDown"), "the server is in trouble: run the same command again later"),
            ("journal.jsonl", Trouble(501, "NotImplemented"), "this store has no conditional writes"),
        ],
    )
    def test_lasting_ones(
        self,
        bucket: StandinBucket,
        full: dict[str, Any],
        trouble: Trouble,
        words: str,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(remote, "LONGEST_WAIT", 0.0)
        fault(bucket, name, trouble, times=1000)
        with pytest.raises(RunError, match=words):
            resta(**full, output=OUT)
        assert "manifest.json" not in bucket.names("out/x")
        bucket.writing = lambda asked: None
        resta(**full, output=OUT)
        assert not verify(OUT)

    def test_another_run_that_begins_later_goes_on(
        self, bucket: StandinBucket, full: dict[str, Any], world: Any, work: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On another machine; the run that finds itself replaced ends, and spoils nothing."""
        later: list[Any] = []

        def writing(asked: Asked) -> None:
            if "config.json" in asked.path and not later:
                later.append(True)
                monkeypatch.setenv("SAFESHARD_WORK", str(world.root / "elsewhere"))
                resta(**full, output=OUT)

        bucket.writing = writing
        with pytest.raises(RunError, match=r"another run has begun to write there .run the same command again once"):
            resta(**full, output=OUT)
        assert not verify(OUT)

    def test_a_journal_that_is_too_large_is_not_read(
        self, bucket: StandinBucket, full: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("safeshard.streamer.plan.written.afar.MAX_JOURNAL_BYTES", 10)
        bucket.put("out/x/journal.jsonl", JOURNAL_MAGIC)
        with pytest.raises(RequestError, match=r"journal.jsonl has more than 10 bytes: it is not ours"):
            resta(**full, output=OUT)

    def test_a_file_that_is_replaced_underway(self, bucket: StandinBucket, full: dict[str, Any]) -> None:
        def writing(asked: Asked) -> None:
            if "config.json" in asked.path:
                bucket.put("out/x/model-00001-of-00003.safetensors", b"x")

        bucket.writing = writing
        with pytest.raises(RunError, match=r"is not what was written: model-00001-of-00003.safetensors"):
            resta(**full, output=OUT)
        assert "manifest.json" not in bucket.names("out/x")

    def test_a_file_that_is_added_underway(self, bucket: StandinBucket, full: dict[str, Any]) -> None:
        def writing(asked: Asked) -> None:
            if "config.json" in asked.path:
                bucket.put("out/x/pytorch_model.bin", b"x")

        bucket.writing = writing
        with pytest.raises(RunError, match=r"was added: pytorch_model.bin"):
            resta(**full, output=OUT)
        assert "manifest.json" not in bucket.names("out/x")
