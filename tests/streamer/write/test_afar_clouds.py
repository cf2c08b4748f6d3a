"""The clouds beside S3: checkpoints read from Google's store and Azure's, outputs written there, also in parts.

Against stand-ins, of which `stand_in_clouds` says what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_outputs import full, local_files, same
from stand_in_clouds import Cloud, StandinGoogle, azure, azurite

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import batch, finish, resta, verify
from safeshard.streamer.sources import open_source
from safeshard.streamer.sources.stores import BucketStore, ConflictError
from safeshard.streamer.sources.stores import bucket as bucket_store

__all__ = ["full"]


@pytest.fixture(params=["google", "azure"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "google":
        monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        google = StandinGoogle()
        for name, value in google.cloud.env.items():
            monkeypatch.setenv(name, value)
        yield google.cloud
        google.close()
        return
    if azurite() is None:
        pytest.skip("Azurite is not installed (npm install azurite)")
    with azure(tmp_path) as made:
        for name, value in made.env.items():
            monkeypatch.setenv(name, value)
        yield made


def test_a_job_from_and_to_a_bucket(
    cloud: Cloud, full: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_store, "PART", 5 << 10)  # so that shards go up in parts
    for role in ("aligned", "unaligned", "finetuned"):
        full[role] = cloud.add(role, full[role])
    resta(**full, output=world.root / "local")
    out = f"{cloud.scheme}://models/out/x"
    resta(**full, output=out)
    assert same(cloud.files("out/x"), local_files(world.root / "local"))
    assert not verify(out)
    with pytest.raises(RequestError, match=r"one is there .choose another, or --overwrite"):
        resta(**full, output=out)
    resta(**full, output=out, overwrite=True)
    assert not verify(out)
    assert "journal.jsonl" not in cloud.files("out/x")


def test_a_batch_in_parts(cloud: Cloud, full: dict[str, Any], world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resta(**full, output=world.root / "local")
    paths = {role: str(path) for role, path in full.items() if isinstance(path, Path)}
    jobs = world.root / "jobs.yaml"
    jobs.write_text(json.dumps({"jobs": [{"method": "resta", "output": f"{cloud.scheme}://models/out/x"} | paths]}))
    for part in ("1/2", "2/2"):
        monkeypatch.setenv("SAFESHARD_WORK", str(world.root / part.replace("/", "-")))
        batch(jobs, part=part, quiet=True)
    assert "manifest.json" not in cloud.files("out/x")
    finish(jobs, quiet=True)
    assert same(cloud.files("out/x"), local_files(world.root / "local"))
    assert cloud.files("out/x.parts") == {}


def test_an_object_that_is_replaced_is_not_read(cloud: Cloud) -> None:
    cloud.put("a/weights.bin", b"before")
    source = open_source(f"{cloud.scheme}://models/a")
    cloud.put("a/weights.bin", b"AFTER!")
    with pytest.raises(RunError, match=r"a/weights.bin"):
        source.readinto("weights.bin", 0, memoryview(bytearray(6)))
    assert source.changed() == {"weights.bin"}


def test_conditions(cloud: Cloud) -> None:
    """Two writers do not overwrite each other; one's own bytes are no conflict; what is gone can be removed."""
    store = BucketStore(f"{cloud.scheme}://models/b")
    seen = store.create("one", b"first")
    assert store.create("one", b"first").is_as(seen)
    with pytest.raises(ConflictError):
        store.create("one", b"second")
    later = store.replace("one", b"third", seen)
    with pytest.raises(ConflictError):
        store.replace("one", b"fourth", seen)
    found = store.look("one")
    assert found is not None
    assert found[0] == b"third"
    assert found[1].is_as(later)
    store.delete(["one", "none"])
    assert store.look("one") is None
