"""Ranges through hf-xet, against its local store."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from small_checkpoint import SHARDS, read_weight, weight
from stand_in_hub import StandinHub

from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.sources import open_source
from safeshard.streamer.sources.hub import xet

hf_xet = pytest.importorskip("hf_xet")


@pytest.fixture
def stored(hub: StandinHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandinHub:
    """The Hub whose shards lie in a local store, too."""
    (tmp_path / "store").mkdir()
    hub.xet_store = f"local://{tmp_path}/store"
    commit = hf_xet.XetSession().new_upload_commit(endpoint=hub.xet_store)
    uploads = {shard: commit.start_upload_bytes((folder / shard).read_bytes(), name=shard) for shard in SHARDS}
    commit.wait_to_finish()
    for shard, upload in uploads.items():
        digest = hashlib.sha256((folder / shard).read_bytes()).hexdigest()
        hub.xet[digest] = upload.result().xet_info.hash
    monkeypatch.setattr(xet, "LEAST_BYTES", 1)
    return hub


def opened(hub: StandinHub) -> Checkpoint:
    checkpoint = open_checkpoint(open_source("org/name"))
    hub.taken()
    return checkpoint


def test_ranges_come_from_the_store(stored: StandinHub) -> None:
    checkpoint = opened(stored)
    assert [read_weight(checkpoint, i) for i in (0, 1, 0)] == [weight(0), weight(1), weight(0)]
    paths = [r.path for r in stored.taken()]
    assert len(paths) == 1  # the token, once
    assert "/xet-read-token/" in paths[0]
    assert checkpoint.source.checked(SHARDS[0]) == "ranges"


def test_small_reads_go_over_http(stored: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xet, "LEAST_BYTES", 4 << 20)
    checkpoint = opened(stored)
    assert read_weight(checkpoint, 0) == weight(0)
    assert [r.status for r in stored.taken()] == [206]


@pytest.mark.parametrize("fault", ["store", "token", "hash"])
def test_without_the_store_they_come_over_http(stored: StandinHub, tmp_path: Path, fault: str) -> None:
    if fault == "store":
        stored.xet_store = f"local://{tmp_path}/elsewhere"
    elif fault == "token":
        stored.fail("/xet-read-token/", status=500)
    else:
        stored.xet = dict.fromkeys(stored.xet, "ab" * 32)
    checkpoint = opened(stored)
    assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]
    assert [r.sent for r in stored.taken() if r.name and r.sent] == [6000, 6000]


def test_a_token_of_the_hub_does_not_go_to_the_store(stored: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    class Session:
        def new_download_stream_group(self, **given: object) -> object:
            seen.update(given)
            return hf_xet.XetSession().new_download_stream_group(endpoint=str(given["endpoint"]))

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(xet, "_session", Session)
    assert read_weight(opened(stored), 0) == weight(0)
    assert "hf_secret" not in str(seen["custom_headers"])
    assert "hf_secret" in str(seen["token_refresh_headers"])


def test_it_can_be_switched_off(stored: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    checkpoint = opened(stored)
    assert read_weight(checkpoint, 0) == weight(0)
    assert [r.status for r in stored.taken()] == [206]
