"""Buckets as sources, against moto's S3 server: ranges, pins, faults, credentials."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import SHARDS, one_line, read_weight, weight
from stand_in_bucket import Asked, StandinBucket, Trouble

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.schema import load
from safeshard.streamer import safemerge, verify
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.sources import open_source, url
from safeshard.streamer.sources.bucket import BucketSource
from safeshard.streamer.sources.url import UrlSource


@pytest.fixture
def model(bucket: StandinBucket, folder: Path) -> str:
    (folder / "sub").mkdir()
    (folder / "sub" / "x.json").write_text("{}")
    return bucket.add("deep/model", folder)


def fails(times: int, status: int, match: str = "safetensors") -> Any:
    left = [times]

    def before(asked: Asked) -> int | None:
        if match in asked.path and left[0]:
            left[0] -= 1
            return status
        return None

    return before


class TestObstore:
    def test_reads_ranges(self, bucket: StandinBucket, model: str, folder: Path) -> None:
        source = open_source(model + "/")
        assert isinstance(source, BucketSource)
        assert source.sizes() == {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
        checkpoint = open_checkpoint(source)
        bucket.taken()
        assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]
        asked = bucket.taken()
        assert [(a.sent, bool(a.if_match)) for a in asked] == [(6000, True)] * 2
        assert source.changed() == set()
        assert source.checked(SHARDS[0]) == "ranges"

    def test_large_tensors_come_in_pieces_side_by_side(
        self, bucket: StandinBucket, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(url, "PIECE", 500)
        checkpoint = open_checkpoint(open_source(model))
        bucket.taken()
        bucket.peak = 0

        def slow(asked: Asked) -> None:
            time.sleep(0.1)

        bucket.before = slow
        assert read_weight(checkpoint, 0) == weight(0)
        assert [a.sent for a in bucket.taken()] == [500] * 12
        assert bucket.peak >= 8

    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_passing_faults(self, bucket: StandinBucket, model: str, status: int) -> None:
        bucket.before = fails(2, status, "/models")
        checkpoint = open_checkpoint(open_source(model))
        bucket.before = fails(3, status)
        assert read_weight(checkpoint, 0) == weight(0)

    @pytest.mark.parametrize(("status", "words"), [(403, "ask for access"), (404, "check the name"), (401, "log in")])
    def test_lasting_faults(self, bucket: StandinBucket, model: str, status: int, words: str) -> None:
        checkpoint = open_checkpoint(open_source(model))
        bucket.taken()
        bucket.before = fails(100, status)
        with pytest.raises(RunError, match=words) as error:
            read_weight(checkpoint, 0)
        assert len(bucket.taken()) == 1
        assert one_line(error).startswith(f"{model}/{SHARDS[0]}: ")

    @pytest.mark.parametrize(
        ("status", "code", "words"),
        [
            (400, "ExpiredToken", "the credentials have expired: renew them"),
            (403, "RequestTimeTooSkewed", "this machine's clock is wrong: set it"),
        ],
    )
    def test_what_a_store_says_besides_its_status(
        self, bucket: StandinBucket, model: str, status: int, code: str, words: str
    ) -> None:
        checkpoint = open_checkpoint(open_source(model))
        bucket.striking = lambda asked: Trouble(status, code)
        with pytest.raises(RunError, match=words):
            read_weight(checkpoint, 0)
        with pytest.raises(RequestError, match=words):
            open_source(model)

    def test_an_object_that_is_replaced_underway(self, bucket: StandinBucket, model: str, folder: Path) -> None:
        checkpoint = open_checkpoint(open_source(model))
        data = bytearray((folder / SHARDS[0]).read_bytes())
        data[-1] ^= 1
        bucket.put(f"deep/model/{SHARDS[0]}", bytes(data))
        assert checkpoint.source.changed() == {SHARDS[0]}
        with pytest.raises(RunError, match=f"{SHARDS[0]}: .*once the file is at rest"):
            read_weight(checkpoint, 0)
        assert read_weight(checkpoint, 1) == weight(1)

    @pytest.mark.parametrize("place", ["s3://models/nothing", "s3://elsewhere/model"])
    def test_what_is_not_there(self, bucket: StandinBucket, place: str) -> None:
        with pytest.raises(RequestError, match=r"bucket|check the name") as error:
            open_source(place)
        assert one_line(error).startswith(place)

    def test_no_server(self, bucket: StandinBucket, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(RequestError, match="check the network"):
            open_source(model)

    def test_a_profile(
        self, bucket: StandinBucket, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [f"{n.lower()} = {v}" for n, v in bucket.env.items() if "KEY" in n]
        (tmp_path / "credentials").write_text("\n".join(["[mine]", *keys]))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_PROFILE", "mine")
        assert "config.json" in open_source(model).sizes()

    def test_no_credentials(self, bucket: StandinBucket, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        with pytest.raises(RequestError, match="AWS_SKIP_SIGNATURE=true for a public bucket") as error:
            open_source(model)
        one_line(error)

    def test_a_stop(self, bucket: StandinBucket, model: str) -> None:
        checkpoint = open_checkpoint(open_source(model))

        def stall(asked: Asked) -> None:
            checkpoint.source.stop()
            time.sleep(3)

        bucket.before = stall
        started = time.monotonic()
        with pytest.raises(RunError, match="given up"):
            read_weight(checkpoint, 0)
        assert time.monotonic() - started < 2


class TestFsspec:
    """Without obstore: the same promises, as far as fsspec knows of them."""

    @pytest.fixture
    def source(self, bucket: StandinBucket, model: str, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
        pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # they hold the server of another test
        monkeypatch.setitem(sys.modules, "obstore", None)
        opened = open_checkpoint(open_source(model))
        assert isinstance(opened.source, UrlSource)
        return opened

    def test_reads(self, source: Checkpoint) -> None:
        assert [read_weight(source, i) for i in (0, 1)] == [weight(0), weight(1)]

    def test_an_object_that_is_replaced_underway(self, source: Checkpoint, bucket: StandinBucket, folder: Path) -> None:
        assert source.source.changed() == set()
        data = bytearray((folder / SHARDS[0]).read_bytes())
        data[-1] ^= 1
        bucket.put(f"deep/model/{SHARDS[0]}", bytes(data))
        assert source.source.changed() == {SHARDS[0]}


def test_a_run_that_reads_a_bucket(bucket: StandinBucket, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of a run on folders; an object that is replaced at the very end shows."""
    trio = world.trio(shards=2)
    places = {role: bucket.add(role, path) for role, path in trio.items()}
    local = safemerge(**trio, output=world.root / "local", quiet=True)
    remote = safemerge(**places, output=world.root / "remote", quiet=True)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert [(local.output / n).read_bytes() for n in names] == [(remote.output / n).read_bytes() for n in names]
    manifest = load(remote.output)
    assert manifest.inputs["aligned"].source == places["aligned"]
    assert verify(remote.output, inputs=True, sources=places) == []

    shard = sorted(trio["unaligned"].glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1

    def replace(asked: Asked) -> None:  # once all of it has been read
        if "list-type" in asked.path or asked.path.rstrip("/") == "/models":
            seen.append(asked)
            if len(seen) == len(trio) + 1:
                bucket.put(f"unaligned/{shard.name}", bytes(data))

    seen: list[Asked] = []
    bucket.before = replace
    with pytest.raises(RunError, match=rf"unaligned/{shard.name} changed while it was read"):
        safemerge(**places, output=world.root / "late", quiet=True)
    assert not (world.root / "late").exists()
    assert not (world.root / "late.partial").exists()
