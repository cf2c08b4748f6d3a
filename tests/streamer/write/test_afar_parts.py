"""Parts of a batch whose outputs lie in a bucket: workers that share nothing but the bucket, and `finish` anywhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_outputs import fault, files, full, same
from stand_in_bucket import Asked, StandinBucket, Trouble
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import batch, finish, verify
from safeshard.streamer.run import parts as gathering
from safeshard.streamer.write.destinations import ToBucket
from safeshard.streamer.write.shelf_afar import BucketShelf
from safeshard.streamer.write.tensor_write import TensorWrite

__all__ = ["full"]
TOKEN = "hf_verysecrettoken"


class Workers:
    """A jobs file, what one process makes of it, and workers of which each has a disk of its own."""

    def __init__(
        self, root: Path, bucket: StandinBucket, monkeypatch: pytest.MonkeyPatch, jobs: list[dict[str, Any]]
    ) -> None:
        self.bucket, self._root, self._patch = bucket, root, monkeypatch
        self.names = [job["output"] for job in jobs]
        self.jobs = jobs
        batch(self._file("whole"), quiet=True)
        self.whole = {name: files(bucket, f"whole/{name}") for name in self.names}
        self.write()

    def write(self, **more: Any) -> None:
        self.file = self._file("out", **more)

    def _file(self, prefix: str, **more: Any) -> Path:
        jobs = [job | {"output": f"s3://models/{prefix}/{job['output']}"} | more for job in self.jobs]
        file = self._root / f"{prefix}.yaml"
        file.write_text(json.dumps({"jobs": jobs}))
        return file

    def at(self, machine: str) -> None:
        self._patch.setenv("SAFESHARD_WORK", str(self._root / "work" / machine))

    def part(self, part: str, machine: str = "", **options: Any) -> list[Any]:
        self.at(machine or part.replace("/", "-"))
        return batch(self.file, part=part, quiet=True, **options)

    def finish(self, machine: str = "elsewhere", **options: Any) -> list[Any]:
        self.at(machine)
        return finish(self.file, quiet=True, **options)

    def left(self) -> list[str]:
        """What is left on the disks, and of the parts."""
        here = [path.name for path in (self._root / "work").glob("*/*")]
        return here + [name for each in self.names for name in self.bucket.names(f"out/{each}.parts")]

    def compare(self) -> None:
        for name in self.names:
            assert same(files(self.bucket, f"out/{name}"), self.whole[name]), name
            assert not verify(f"s3://models/out/{name}")

    def nothing_looks_finished(self) -> None:
        assert not any(name.endswith("manifest.json") for name in self.bucket.names("out"))


@pytest.fixture
def shards(full: dict[str, Any], world: Any, bucket: StandinBucket, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """A job on checkpoints of a shard a layer, and one that ranks."""
    paths = {role: str(path) for role, path in full.items() if isinstance(path, Path)}
    jobs = [
        {"method": "resta", "output": "x"} | paths,
        {"method": "safelora", "num_layers": 5, "output": "ranked"} | paths,
    ]
    return Workers(world.root, bucket, monkeypatch, jobs)


@pytest.fixture
def one(full: dict[str, Any], world: Any, bucket: StandinBucket, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """The first of these jobs alone."""
    paths = {role: str(path) for role, path in full.items() if isinstance(path, Path)}
    return Workers(world.root, bucket, monkeypatch, [{"method": "resta", "output": "x"} | paths])


@pytest.fixture
def adapter(world: Any, bucket: StandinBucket, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """A job whose one file several parts write."""
    paths = {role: str(path) for role, path in world.trio(layers=3).items()}
    return Workers(world.root, bucket, monkeypatch, [{"method": "safemerge", "threshold": 0.7, "output": "a"} | paths])


@pytest.fixture
def hub_token(empty_hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    empty_hub.writes.token = TOKEN


def test_the_bytes_of_one_machine(shards: Workers) -> None:
    """A ranking is decided by the numbers of all; the part that came last decides its own, `finish` the others'."""
    waits = [each.record is None for part in ("1/3", "3/3", "2/3") for each in shards.part(part)]
    assert waits == [False, True, False, True, False, False]
    shards.nothing_looks_finished()
    shards.finish()
    shards.compare()
    assert not [name for name in shards.bucket.names("out") if ".parts/" in name]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: safeshard[ray]")
def test_ray_runs_the_same_parts(shards: Workers) -> None:
    """As a user starts it: Ray comes up on this machine, and its workers find the bucket."""
    words = [sys.executable, "-m", "safeshard", "batch", str(shards.file), "--engine", "ray", "--parts", "2"]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    more = ["--device", "cpu", "--memory", "64MiB", "--quiet"]
    done = subprocess.run([*words, *more], env=env, capture_output=True, text=True, timeout=600)
    if "Ray did not start" in done.stderr:
        pytest.skip(done.stderr[-300:])
    assert done.returncode == 0, done.stderr
    shards.compare()
    assert not [name for name in shards.bucket.names("out") if ".parts/" in name]


def test_a_second_round_of_parts_leaves_finish_nothing_to_compute(
    shards: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        for part in ("1/2", "2/2"):
            shards.part(part, machine="any")  # which has none of what another machine had on its disk
    monkeypatch.setattr(gathering, "run_part", None)
    shards.finish()
    shards.compare()


def test_whole_shards_are_copied_within_the_bucket(one: Workers) -> None:
    for part in ("1/3", "2/3", "3/3"):
        one.part(part)
    one.bucket.taken()
    one.finish()
    asked = one.bucket.taken()
    assert [a.path for a in asked if a.method == "GET" and ".safetensors" in a.path] == []
    assert sum("x/model-" in a.path for a in asked if a.method == "PUT") == 3
    written = [a.path.rpartition("/")[2] for a in asked if a.method == "PUT"]
    assert (written[0], written[-1]) == ("journal.jsonl", "manifest.json")
    one.compare()


def test_a_file_of_several_parts_goes_through_finish(adapter: Workers) -> None:
    for part in ("1/2", "2/2"):
        adapter.part(part)
    adapter.finish()
    adapter.compare()


def test_a_shard_that_is_too_large_to_be_copied_goes_through_finish(
    one: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("1/2", "2/2"):
        one.part(part)
    monkeypatch.setattr(gathering, "COPIED_AT_MOST", 1000)
    one.finish()
    one.compare()


def test_finish_reads_each_record_once_and_lists_a_prefix_seldom(one: Workers) -> None:
    for part in ("1/2", "2/2"):
        one.part(part)
    one.bucket.taken()
    one.finish()
    asked = one.bucket.taken()
    records = Counter(a.path for a in asked if a.method == "GET" and a.path.endswith("part.json"))
    assert len(records) == 2
    assert set(records.values()) == {1}
    listings = [a for a in asked if a.method == "GET" and a.path == "/models"]
    # Of the place: planned, claimed, checked. Of the parts: which, their records, what is to go.
    assert len(listings) <= 7
    one.compare()


def test_a_part_that_is_done_is_not_done_again(one: Workers) -> None:
    one.part("1/2")
    one.bucket.taken()
    assert one.part("1/2", machine="another")[0].record is not None
    assert {a.method for a in one.bucket.taken()} <= {"GET", "HEAD"}
    one.part("2/2")
    one.finish()
    one.compare()


def test_a_part_that_failed_goes_on_elsewhere(one: Workers) -> None:
    once = fault(one.bucket, "model-00002", Trouble(403, "AccessDenied"))
    with pytest.raises(RunError, match=r"use credentials that may write there"):
        one.part("1/1")
    assert once.count == 1
    with pytest.raises(RequestError, match=r"s3://models/out/x: 1/1: expected a finished part, got an unfinished one"):
        one.finish()
    one.bucket.taken()
    one.part("1/1", machine="another")
    assert not [a for a in one.bucket.taken() if a.method == "PUT" and "model-00001" in a.path]
    one.finish()
    one.compare()


def test_missing_parts_are_named(one: Workers) -> None:
    with pytest.raises(RequestError, match=r"s3://models/out/x: expected its parts, got none"):
        one.finish()
    one.part("2/3")
    with pytest.raises(RequestError, match=r"out/x: expected a finished part, got none .*: 1/3, 3/3$"):
        one.finish()
    with pytest.raises(RequestError, match=r"expected one of 2 parts, as those there, got parts of 3"):
        one.part("1/2")
    for part in ("1/2", "2/2"):
        one.part(part, overwrite=True)
    one.finish()
    one.compare()


@pytest.mark.parametrize("at", ["journal.jsonl", "part.json"])  # moto overwrites no object at the instant of a listing
def test_two_workers_at_one_part(one: Workers, at: str) -> None:
    """On machines that do not see each other: both end, and what they did is one."""
    later: list[Any] = []

    def writing(asked: Asked) -> None:
        if asked.path.endswith(at) and not later:
            later.append(True)
            later.extend(one.part("1/1", machine="another"))

    one.bucket.writing = writing
    first = one.part("1/1")
    assert first[0].record is not None
    assert later[1].record is not None
    one.finish()
    one.compare()


def test_machines_that_round_differently_spoil_nothing(one: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record speaks of the files that its own worker brought, though another brought others meanwhile."""
    later: list[Any] = []

    def writing(asked: Asked) -> None:
        if asked.path.endswith("journal.jsonl") and not later:
            later.append(True)
            with monkeypatch.context() as other:
                other.setattr(TensorWrite, "add_tensor", _rounded)
                later.extend(one.part("1/1", machine="another"))

    one.bucket.writing = writing
    (first,) = one.part("1/1")
    assert first.record is not None
    assert first.record.hashes != later[1].record.hashes
    one.finish()
    one.compare()


def _rounded(self: TensorWrite, tensor: torch.Tensor, write: Any = TensorWrite.add_tensor) -> None:
    write(self, tensor * 1.01)


def _shard(bucket: StandinBucket) -> None:
    (key,) = [name for name in bucket.names("out/x.parts/1-of-2") if name.startswith("model-00001")]
    bucket.delete(f"out/x.parts/1-of-2/{key}")


def _record(bucket: StandinBucket) -> None:
    bucket.put("out/x.parts/1-of-2/part.json", b"{")


@pytest.mark.parametrize(("lose", "said"), [(_shard, "one whose files are gone"), (_record, "an unfinished one")])
def test_what_is_lost_is_made_again(one: Workers, lose: Callable[[StandinBucket], None], said: str) -> None:
    for part in ("1/2", "2/2"):
        one.part(part)
    lose(one.bucket)
    with pytest.raises(RequestError, match=rf"x: 1/2: expected a finished part, got {said}"):
        one.finish()
    one.part("1/2", machine="another")
    one.finish()
    one.compare()


def test_a_flipped_bit_is_seen_where_bytes_go_through_finish(adapter: Workers) -> None:
    for part in ("1/2", "2/2"):
        adapter.part(part)
    (name,) = [name for name in adapter.bucket.names("out/a.parts/1-of-2") if name.endswith(".part")]
    data = bytearray(adapter.bucket.get(f"out/a.parts/1-of-2/{name}"))
    data[-1] ^= 1
    adapter.bucket.put(f"out/a.parts/1-of-2/{name}", bytes(data))
    with pytest.raises(RunError, match=r"is not what was written there .*run the part again, --part 1/2"):
        adapter.finish()
    adapter.nothing_looks_finished()
    adapter.bucket.delete(f"out/a.parts/1-of-2/{name}")
    adapter.part("1/2")
    adapter.finish()
    adapter.compare()


def test_another_request_is_refused(one: Workers) -> None:
    one.part("1/2")
    one.write(gamma=0.25)
    with pytest.raises(RequestError, match=r"another request; --overwrite starts anew"):
        one.part("1/2", machine="another")
    one.part("2/2")
    with pytest.raises(RequestError, match=r"s3://models/out/x: part 1/2: options.gamma"):
        one.finish()
    one.part("1/2", overwrite=True)
    one.finish()
    assert json.loads(one.bucket.get("out/x/manifest.json"))["method"]["options"]["gamma"] == 0.25


@pytest.mark.parametrize(
    ("owner", "method"), [(ToBucket, "_bring"), (ToBucket, "publish"), (ToBucket, "_check"), (BucketShelf, "clear")]
)
def test_finish_that_is_interrupted_goes_on(
    one: Workers, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    for part in ("1/2", "2/2"):
        one.part(part)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, _interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.finish()
    assert ("manifest.json" in one.bucket.names("out/x")) == (method == "clear")
    one.part("1/2", machine="another")  # a late duplicate
    one.finish(machine="yet another")
    one.compare()
    assert not one.bucket.names("out/x.parts")


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_overwrite_replaces_at_the_end_only(one: Workers) -> None:
    batch(one.file, quiet=True)
    for part in ("1/2", "2/2"):
        assert one.part(part)[0].manifest is not None  # finished earlier
        one.part(part, overwrite=True)
    one.compare()
    one.finish(overwrite=True)
    one.compare()
    assert not one.bucket.names("out/x.parts")


def test_inputs_that_changed_leave_nothing(one: Workers, full: dict[str, Any]) -> None:
    def writing(asked: Asked) -> None:
        if asked.path.endswith("journal.jsonl"):  # first when the part begins, whatever shards take to go up
            (full["finetuned"] / "model-00001-of-00003.safetensors").touch()

    one.bucket.writing = writing
    with pytest.raises(RunError, match=r"changed while it was read"):
        one.part("1/1")
    assert one.left() == []


def test_a_repository_has_no_place_for_parts(one: Workers, empty_hub: StandinHub, hub_token: None) -> None:
    one.write(output="hf://me/x")
    with pytest.raises(RequestError, match=r"hf://me/x.*give a folder that all workers see, and push"):
        one.part("1/2")


def test_a_folder_that_is_pushed_is_pushed_by_finish(
    one: Workers, empty_hub: StandinHub, hub_token: None, tmp_path: Path
) -> None:
    one.write(output=str(tmp_path / "shared"), push="me/x")
    for part in ("1/2", "2/2"):
        one.part(part)
    one.finish()
    assert not verify("hf://me/x")
    assert not verify(tmp_path / "shared")
