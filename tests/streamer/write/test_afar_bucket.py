"""Outputs in a bucket, against moto's S3 server: the bytes of a local run, shards as they come, resume, conditions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_bucket import Asked, StandinBucket, Trouble

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.safetensors_header import TensorRef
from safeshard.streamer import batch, resta, verify
from safeshard.streamer.methods import METHODS
from safeshard.streamer.options import build
from safeshard.streamer.plan.afar import bytes_here
from safeshard.streamer.plan.job_plan import JobPlan, OutputFile
from safeshard.streamer.plan.ours import JOURNAL_MAGIC
from safeshard.streamer.sources.stores import bucket as bucket_store

OUT = "s3://models/out/x"


def files(bucket: StandinBucket, prefix: str = "out/x") -> dict[str, bytes]:
    return {name: bucket.get(f"{prefix}/{name}") for name in bucket.names(prefix)}


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(ours: dict[str, bytes], theirs: dict[str, bytes]) -> bool:
    """Whether two outputs are one, but for when and how fast they were written."""

    def content(output: dict[str, bytes]) -> dict[str, Any]:
        manifest = json.loads(output["manifest.json"])
        return output | {"manifest.json": {k: v for k, v in manifest.items() if k not in ("run", "blake3")}}

    return content(ours) == content(theirs)


@pytest.fixture
def full(world: Any) -> dict[str, Any]:
    """A job on checkpoints of a shard a layer, with copies in each."""
    tensors = world.llama(3, seed=1)
    folders = {}
    for seed, role in enumerate(("aligned", "unaligned", "finetuned")):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in tensors.items()}
        folders[role] = world.checkpoint(role, moved, 3)
        _by_layer(folders[role], moved)
    return folders | {"quiet": True, "memory": "64MiB"}


def _by_layer(folder: Path, tensors: dict[str, Any]) -> None:
    """Lay a checkpoint out as published ones are: a shard holds layers."""
    from safetensors.torch import save_file

    def shard(name: str) -> str:
        layer = int(name.split(".")[2]) if ".layers." in name else 2 * ("embed" not in name)
        return f"model-{layer + 1:05d}-of-00003.safetensors"

    for file in {shard(name) for name in tensors}:
        save_file({n: t for n, t in tensors.items() if shard(n) == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard(name) for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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

    def test_shards_go_up_as_they_are_finished_and_leave_the_disk(
        self, bucket: StandinBucket, full: dict[str, Any], work: Path
    ) -> None:
        """While the last shard goes up, the others take no room here any more."""
        held: list[int] = []

        def writing(asked: Asked) -> None:
            if "model-" in asked.path:
                held.append(sum(p.stat().st_size for p in work.glob("*.partial/*.part")))

        bucket.writing = writing
        resta(**full, output=OUT)
        order = [a.path.rpartition("/")[2] for a in bucket.taken() if a.method == "PUT" and "model-" in a.path]
        assert order == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        sizes = bucket.names("out/x")
        assert held[-1] <= held[0] - sizes[order[0]] - sizes[order[1]] + 1

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
    def test_killed(self, bucket: StandinBucket, full: dict[str, Any], world: Any, at: str) -> None:
        """kill -9 while a shard, the manifest, or the journal's removal is under way."""
        resta(**full, output=world.root / "local")
        words = [f"--{k}={v}" for k, v in full.items() if k != "quiet"]
        command = [sys.executable, "-m", "safeshard", "resta", *words, f"--output={OUT}", "--quiet"]
        child: list[subprocess.Popen[bytes]] = []

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
        with subprocess.Popen(command) as process:
            child.append(process)
            assert process.wait(120) == -9
        assert ("manifest.json" in bucket.names("out/x")) == (at != "model-00002-of-00003.safetensors")
        assert "journal.jsonl" in bucket.names("out/x")
        subprocess.run(command, check=True, timeout=120)
        assert same(files(bucket), local_files(world.root / "local"))


class _Once:
    count = 0


def fault(bucket: StandinBucket, match: str, trouble: Trouble, times: int = 1) -> _Once:
    """Let the first writes whose path matches go wrong."""
    once = _Once()

    def writing(asked: Asked) -> Trouble | None:
        if match in asked.path and once.count < times:
            once.count += 1
            return trouble
        return None

    bucket.writing = writing
    return once


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
            ("journal.jsonl", Trouble(501, "NotImplemented"), "this store has no conditional writes"),
        ],
    )
    def test_lasting_ones(
        self, bucket: StandinBucket, full: dict[str, Any], trouble: Trouble, words: str, name: str
    ) -> None:
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
        monkeypatch.setattr("safeshard.streamer.plan.afar.MAX_JOURNAL_BYTES", 10)
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
