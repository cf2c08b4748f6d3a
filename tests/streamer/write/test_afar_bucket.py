"""Outputs in a bucket, against moto's S3 server: the bytes of a local run, shards as they come, whose place it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bucket_outputs import OUT, files, full, local_files, same
from stand_in_bucket import Asked, StandinBucket

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer import batch, resta
from safeshard.streamer.methods import METHODS
from safeshard.streamer.options import build
from safeshard.streamer.plan.job_plan import JobPlan, OutputFile
from safeshard.streamer.plan.ours import JOURNAL_MAGIC
from safeshard.streamer.plan.written.afar import bytes_here
from safeshard.streamer.sources.stores import bucket as bucket_store

__all__ = ["full"]


class TestWrites:
    def test_the_bytes_of_a_local_run(
        self, bucket: StandinBucket, full: dict[str, Any], world: Any, work: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bucket_store, "PART", 5 << 10)
        local = resta(**full, output=world.root / "local")
        bucket.taken()
        result = resta(**full, output=OUT)
        assert result.output == OUT
        assert same(files(bucket), local_files(world.root / "local"))
        assert local.manifest is not None
        assert list(work.iterdir()) == []
        assert bucket.unfinished() == 0
        written = [a.path.rpartition("/")[2] for a in bucket.taken() if a.method in ("PUT", "POST")]
        assert written[0] == "journal.jsonl"
        assert [name for name in written if name not in ("journal.jsonl", "models")][-1] == "manifest.json"

    def test_a_batch_that_keeps_going_looks_once(self, bucket: StandinBucket, full: dict[str, Any], world: Any) -> None:
        """Each job is planned by itself first: what is read of inputs and places then is not asked for again."""
        places = {role: bucket.add(f"in/{role}", folder) for role, folder in full.items() if isinstance(folder, Path)}
        asked = {}
        for keeps_going in (False, True):
            job = places | {"method": "resta", "output": f"s3://models/out/{keeps_going}"}
            (world.root / "jobs.yaml").write_text(json.dumps({"jobs": [job]}))
            bucket.taken()
            batch(world.root / "jobs.yaml", keep_going=keeps_going, quiet=True)
            asked[keeps_going] = sum(a.method == "GET" for a in bucket.taken())
        assert asked[True] == asked[False]

    def test_shards_go_up_as_they_are_finished_and_leave_the_disk(
        self, bucket: StandinBucket, full: dict[str, Any], work: Path
    ) -> None:
        """Two go up at once, either first; when the last one does, one of the others takes no room here."""
        held: list[int] = []

        def writing(asked: Asked) -> None:
            if "model-" in asked.path:
                held.append(sum(p.stat().st_size for p in work.glob("*.partial/*.part")))

        bucket.writing = writing
        resta(**full, output=OUT)
        order = [a.path.rpartition("/")[2] for a in bucket.taken() if a.method == "PUT" and "model-" in a.path]
        assert sorted(order) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        sizes = bucket.names("out/x")
        assert held[-1] <= held[0] - min(sizes[order[0]], sizes[order[1]])

    def test_no_upload_has_more_parts_than_stores_take(
        self, bucket: StandinBucket, full: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bucket_store, "PART", 100)
        monkeypatch.setattr(bucket_store, "MAX_PARTS", 3)
        resta(**full, output=OUT)
        parts = [a for a in bucket.taken() if a.method == "PUT" and "model-00001" in a.path]
        assert len(parts) == 3

    def test_a_batch_passes_by_what_is_finished(self, bucket: StandinBucket, world: Any) -> None:
        jobs = _jobs(world, "s3://models/out/{threshold}")
        first = batch(jobs, quiet=True)
        assert [r.output for r in first] == ["s3://models/out/0.3", "s3://models/out/0.4"]
        bucket.taken()
        again = batch(jobs, quiet=True)
        assert [r.plan.finished is not None for r in again] == [True, True]
        assert {a.method for a in bucket.taken()} <= {"GET", "HEAD"}

    def test_only_the_shards_under_way_need_room_here(self, full: dict[str, Any]) -> None:
        roles = ("aligned", "unaligned", "finetuned")
        job = build(METHODS["resta"], {role: full[role] for role in roles} | {"output": OUT})
        plan = JobPlan(job, {})
        plan.files = [OutputFile(f"{n}", b"", {"t": TensorRef("t", "U8", (n,), "", 0, n)}) for n in range(1, 10)]
        assert bytes_here(plan) == 9 + 8 + 7 + 6


def _jobs(world: Any, output: str) -> Path:
    paths = {role: str(path) for role, path in world.trio(layers=1).items()}
    job = {"method": "safemerge", "matrix": {"threshold": [0.3, 0.4]}, "output": output}
    file: Path = world.root / "jobs.yaml"
    file.write_text(json.dumps({"defaults": paths, "jobs": [job]}))
    return file


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "overwrite"),
        [("notes.txt", False), ("deeper/model.safetensors", True), ("manifest.json", True), ("journal.jsonl", False)],
    )
    def test_a_foreign_prefix(self, bucket: StandinBucket, full: dict[str, Any], name: str, overwrite: bool) -> None:
        bucket.put(f"out/x/{name}", b"mine")
        with pytest.raises(RequestError, match=f"safeshard did not write: {name}") as refused:
            resta(**full, output=OUT, overwrite=overwrite)
        assert refused.value.offences[0].where == "--output"
        assert files(bucket) == {name: b"mine"}

    def test_a_finished_output(self, bucket: StandinBucket, full: dict[str, Any]) -> None:
        resta(**full, output=OUT)
        before = files(bucket)
        with pytest.raises(RequestError, match=r"one is there .choose another, or --overwrite"):
            resta(**full, output=OUT)
        bucket.put("out/x/notes.txt", b"mine")
        with pytest.raises(RequestError, match=r"one that also holds notes.txt"):
            resta(**full, output=OUT, overwrite=True)
        assert files(bucket) == before | {"notes.txt": b"mine"}

    @pytest.mark.parametrize("place", ["s3://models/aligned", "s3://models/aligned/out", "s3://models"])
    def test_across_an_input(self, bucket: StandinBucket, full: dict[str, Any], place: str) -> None:
        aligned = bucket.add("aligned", full["aligned"])
        with pytest.raises(RequestError, match=r"apart from the inputs|s3://bucket/prefix"):
            resta(**full | {"aligned": aligned}, output=place)

    @pytest.mark.parametrize(
        "place", ["s3://key:secret@models/x", "s3://models/x?versionId=1", "https://host/x", "s3://models/a/../b",
                  "s3://models/*", "memory://x", "hf://org/name@main", "hf://org/name/folder", "hf://name"],
    )  # fmt: skip
    def test_places_that_are_not_written_to(self, full: dict[str, Any], place: str) -> None:
        with pytest.raises(RequestError, match=r"expected a local folder, s3://bucket/prefix") as refused:
            resta(**full, output=place)
        assert "secret" not in str(refused.value)

    def test_no_such_bucket(self, bucket: StandinBucket, full: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match=r"a bucket is not made, it has to be there"):
            resta(**full, output="s3://nowhere/x")

    def test_without_the_extra(self, full: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "obstore", None)
        with pytest.raises(RequestError, match=r"safeshard\[buckets\]"):
            resta(**full, output=OUT)

    def test_jobs_of_one_place(self, bucket: StandinBucket, world: Any) -> None:
        with pytest.raises(RequestError, match=r"a folder of its own for each job"):
            batch(_jobs(world, "s3://models/out/same"), quiet=True)


class TestOverwrite:
    def test_nothing_is_whole_meanwhile(self, bucket: StandinBucket, full: dict[str, Any], world: Any) -> None:
        """The earlier manifest goes before the first shard comes; files that the new output lacks go at the end."""
        resta(**full, output=OUT)
        single = world.checkpoint("single", world.llama(3, seed=1))
        seen: list[set[str]] = []

        def writing(asked: Asked) -> None:
            if asked.path.endswith("/model.safetensors"):
                seen.append(set(bucket.names("out/x")))

        bucket.writing = writing
        resta(**full | {"aligned": single}, output=OUT, overwrite=True)
        assert "manifest.json" not in seen[0]
        assert "model-00001-of-00003.safetensors" in seen[0]
        resta(**full | {"aligned": single}, output=world.root / "local")
        assert same(files(bucket), local_files(world.root / "local"))

    def test_the_earlier_one_stays_until_a_shard_is_there(self, bucket: StandinBucket, full: dict[str, Any]) -> None:
        resta(**full, output=OUT)
        before = files(bucket)
        with pytest.raises(RunError, match=r"NaN or infinity"):
            resta(**full | {"finetuned": _spoilt(full["finetuned"], 0)}, output=OUT, overwrite=True)
        assert files(bucket) == before | {"journal.jsonl": files(bucket)["journal.jsonl"]}

    def test_killed_underway(self, bucket: StandinBucket, full: dict[str, Any], work: Path) -> None:
        """The rest of the earlier output is still known as ours, and goes once the new one is there."""
        resta(**full, output=OUT)
        bucket.delete("out/x/manifest.json")
        names = sorted(bucket.names("out/x"))
        bucket.put("out/x/journal.jsonl", b"")
        with pytest.raises(RequestError, match=r"safeshard did not write"):  # nothing marks it
            resta(**full, output=OUT)
        first = JOURNAL_MAGIC + b'"fingerprint":{"files":' + json.dumps(names).encode() + b"}}\n"
        bucket.put("out/x/journal.jsonl", first)
        resta(**full, output=OUT, overwrite=True)
        assert "journal.jsonl" not in bucket.names("out/x")
        assert "manifest.json" in bucket.names("out/x")


def _spoilt(folder: Path, layer: int) -> Path:
    """A checkpoint with a NaN in a weight of a layer."""
    from safetensors.torch import load_file, save_file

    file = folder / f"model-{layer + 1:05d}-of-00003.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.{layer}.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return folder
