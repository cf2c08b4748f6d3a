"""Whole shards in the Hub's cache: the layout, hashes, budgets, what a kill leaves, and work offline."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import SHARDS, one_line, read_weight, reload_hub, weight
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.sources import ShardCache, open_source
from safeshard.streamer.sources.hub import shard_cache

SIZE = 6096  # of a shard


def blobs(tmp_path: Path) -> dict[str, int]:
    folder = tmp_path / "cache" / "hub" / "models--org--name" / "blobs"
    return {p.name: p.stat().st_size for p in folder.iterdir()} if folder.is_dir() else {}


def cached(**options: Any) -> Checkpoint:
    return open_checkpoint(open_source("org/name", ShardCache(fetches=True, **options)))


@pytest.fixture
def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / shard).read_bytes()).hexdigest() for shard in SHARDS]


def offline(hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reload_hub(monkeypatch)


class TestLayout:
    def test_huggingface_hub_finds_what_was_downloaded(self, hub: StandinHub, tmp_path: Path) -> None:
        from huggingface_hub import scan_cache_dir, try_to_load_from_cache

        checkpoint = cached()
        assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]
        path = try_to_load_from_cache("org/name", SHARDS[0])
        assert isinstance(path, str)
        assert Path(path).is_symlink()
        (repo,) = scan_cache_dir().repos
        assert repo.refs.keys() == {"main"}
        assert {file.file_name for file in repo.refs["main"].files} >= {*SHARDS, "config.json"}
        assert not [name for name in blobs(tmp_path) if "safeshard" in name]

    def test_huggingface_hub_s_own_downloads_are_used(self, hub: StandinHub) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download("org/name", SHARDS[0])
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.taken()
        assert read_weight(checkpoint, 0) == weight(0)
        assert checkpoint.source.checked(SHARDS[0]) == "hash"
        assert hub.taken() == []

    def test_each_shard_is_downloaded_once(self, hub: StandinHub) -> None:
        checkpoint = cached()
        hub.taken()
        threads = [threading.Thread(target=read_weight, args=(checkpoint, i % 2)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(r.sent for r in hub.taken()) == 2 * SIZE


class TestHashes:
    @pytest.mark.parametrize("size", [SIZE, 1000])
    def test_a_damaged_copy_is_left_alone_and_named(
        self, hub: StandinHub, tmp_path: Path, digests: list[str], size: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        read_weight(cached(), 0)
        blob = tmp_path / "cache" / "hub" / "models--org--name" / "blobs" / digests[0]
        blob.write_bytes(blob.read_bytes()[: size - 1] + b"\x55")
        checkpoint = open_checkpoint(open_source("org/name"))
        assert read_weight(checkpoint, 0) == weight(0)
        assert checkpoint.source.checked(SHARDS[0]) == "ranges"
        if size == SIZE:
            assert f"damaged and left alone; remove it: {blob}" in caplog.text
        assert read_weight(cached(), 0) == weight(0)  # which puts it right
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == digests[0]

    def test_what_came_damaged_is_not_used(self, hub: StandinHub, tmp_path: Path) -> None:
        checkpoint = cached()
        hub.fail(f"/cdn/.*{SHARDS[0]}", "flip", after=3000)
        with pytest.raises(RunError, match=r"not what the Hub states of it \(sha256 .*another mirror"):
            read_weight(checkpoint, 0)
        assert {size for size in blobs(tmp_path).values() if size == SIZE} == set()

    def test_once_damaged_is_fetched_again(self, hub: StandinHub) -> None:
        checkpoint = cached()
        hub.fail(f"/cdn/.*{SHARDS[0]}", "flip", after=3000, times=1)
        assert read_weight(checkpoint, 0) == weight(0)


class TestBudget:
    def test_no_more_than_the_budget_is_held(self, hub: StandinHub, tmp_path: Path) -> None:
        checkpoint = cached(budget=SIZE + 100)
        for layer in (0, 1, 0, 1):
            assert read_weight(checkpoint, layer) == weight(layer)
            assert sum(size for size in blobs(tmp_path).values() if size >= 1000) <= SIZE + 100

    def test_both_fit(self, hub: StandinHub) -> None:
        checkpoint = cached(budget=2 * SIZE)
        hub.taken()
        for layer in (0, 1, 0, 1):
            read_weight(checkpoint, layer)
        assert sum(r.sent for r in hub.taken()) == 2 * SIZE

    def test_many_readers_of_a_small_budget(self, hub: StandinHub) -> None:
        checkpoint, wrong = cached(budget=SIZE), []

        def read(layer: int) -> None:
            wrong.extend([layer] * (read_weight(checkpoint, layer) != weight(layer)))

        threads = [threading.Thread(target=read, args=(i % 2,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []

    def test_a_later_run_uses_what_is_left_and_counts_it(self, hub: StandinHub, tmp_path: Path) -> None:
        read_weight(cached(budget=SIZE), 0)
        checkpoint = cached(budget=SIZE)
        hub.taken()
        assert read_weight(checkpoint, 0) == weight(0)
        assert hub.taken() == []
        assert read_weight(checkpoint, 1) == weight(1)
        assert [size for size in blobs(tmp_path).values() if size >= 1000] == [SIZE]

    def test_what_others_downloaded_is_never_dropped(self, hub: StandinHub, tmp_path: Path, digests: list[str]) -> None:
        read_weight(cached(), 0)
        checkpoint = cached(budget=SIZE)
        for layer in (0, 1, 0, 1):
            assert read_weight(checkpoint, layer) == weight(layer)
        assert blobs(tmp_path).keys() >= set(digests)

    def test_a_shard_that_exceeds_it(self, hub: StandinHub) -> None:
        with pytest.raises(RunError, match=r"--cache-budget is 1000 \(raise"):
            read_weight(cached(budget=1000), 0)


class TestInterrupted:
    def test_a_download_that_was_cut_off_is_gone_on_with(
        self, hub: StandinHub, tmp_path: Path, digests: list[str], folder: Path
    ) -> None:
        checkpoint = cached()
        place = tmp_path / "cache" / "hub" / "models--org--name" / "blobs"
        part = place / f"{digests[0]}.safeshard.part"
        part.write_bytes((folder / SHARDS[0]).read_bytes()[:4000])
        hub.taken()
        assert read_weight(checkpoint, 0) == weight(0)
        assert sum(r.sent for r in hub.taken()) == SIZE - 4000
        assert not part.exists()

    @pytest.mark.parametrize("content", [b"\0" * 4000, b"\0" * 9000])
    def test_a_damaged_part_is_begun_anew(
        self, hub: StandinHub, tmp_path: Path, digests: list[str], content: bytes
    ) -> None:
        checkpoint = cached()
        place = tmp_path / "cache" / "hub" / "models--org--name" / "blobs"
        (place / f"{digests[0]}.safeshard.part").write_bytes(content)
        assert read_weight(checkpoint, 0) == weight(0)

    def test_a_full_disk(self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = cached()

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shard_cache.os, "pwrite", full)
        with pytest.raises(RunError, match=r"no room in the Hub's cache, .*/hub: .*hf cache rm") as error:
            read_weight(checkpoint, 0)
        one_line(error)


class TestOffline:
    def test_goes_on_from_the_cache(self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
        online = cached()
        assert [read_weight(online, i) for i in (0, 1)] == [weight(0), weight(1)]
        offline(hub, monkeypatch)
        for spec in ("org/name", f"hf://org/name@{online.source.revision}"):
            checkpoint = open_checkpoint(open_source(spec))
            assert (checkpoint.source.spec, checkpoint.source.revision) == (spec, online.source.revision)
            assert read_weight(checkpoint, 1) == weight(1)
            assert checkpoint.source.checked(SHARDS[1]) == "hash"

    def test_a_damaged_copy_is_named(
        self, hub: StandinHub, tmp_path: Path, digests: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = cached()
        for layer in (0, 1):
            read_weight(checkpoint, layer)
        offline(hub, monkeypatch)
        blob = tmp_path / "cache" / "hub" / "models--org--name" / "blobs" / digests[1]
        blob.write_bytes(blob.read_bytes()[:-1] + b"\x55")
        checkpoint = open_checkpoint(open_source("org/name"))
        assert read_weight(checkpoint, 0) == weight(0)
        with pytest.raises(RunError, match=rf"damaged: {blob} .*remove {blob}, and run again online"):
            read_weight(checkpoint, 1)

    def test_a_truncated_copy_is_named(
        self, hub: StandinHub, tmp_path: Path, digests: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = cached()
        for layer in (0, 1):
            read_weight(checkpoint, layer)
        offline(hub, monkeypatch)
        blob = tmp_path / "cache" / "hub" / "models--org--name" / "blobs" / digests[1]
        blob.write_bytes(blob.read_bytes()[:3000])
        with pytest.raises(RunError, match=rf"damaged: {blob} .*remove {blob}, and run again online"):
            open_checkpoint(open_source("org/name"))

    def test_a_shard_that_is_missing_is_named(self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = cached()
        read_weight(checkpoint, 0)
        checkpoint.source.read("model.safetensors.index.json", 0, 2)
        offline(hub, monkeypatch)
        with pytest.raises(RequestError, match=f"{SHARDS[1]}: .*no such file") as error:
            open_checkpoint(open_source("org/name"))
        assert one_line(error).startswith("org/name/")

    @pytest.mark.parametrize("spec", ["org/other", "hf://org/name@v1"])
    def test_what_is_not_cached(self, hub: StandinHub, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
        cached()
        offline(hub, monkeypatch)
        with pytest.raises(RequestError, match=r"HF_HUB_OFFLINE is set.*no copy of .*hf download") as error:
            open_source(spec)
        one_line(error)
