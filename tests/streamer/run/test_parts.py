"""A batch in parts: the bytes of one machine, whoever does which part, in any order, again and again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.verify import verify
from safeshard.streamer import batch, calibrate, finish
from safeshard.streamer.plan.parts import Part
from safeshard.streamer.run import parts as parts_of_a_batch
from safeshard.streamer.sources import LocalSource
from safeshard.streamer.write.shelf import FolderShelf
from safeshard.streamer.write.writer import Writer

Contents = dict[str, dict[str, Any]]


def contents(root: Path) -> Contents:
    """All files of all outputs; of manifests all but what differs from run to run."""
    found: Contents = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            data: Any = path.read_bytes()
            if path.name == "manifest.json":
                data = {k: v for k, v in json.loads(data).items() if k not in ("run", "blake3")}
            found.setdefault(str(path.parent.relative_to(root)), {})[path.name] = data
    return found


class Cluster:
    """A jobs file, what one machine makes of it, and workers that all write to `root`."""

    def __init__(self, folder: Path, jobs: list[dict[str, Any]], **defaults: Any) -> None:
        self.root, self.file = folder / "out", folder / "jobs.yaml"
        self.write(jobs, **defaults)
        batch(self.file, quiet=True)
        self.whole = contents(self.root)
        shutil.rmtree(self.root)

    def write(self, jobs: list[dict[str, Any]], **defaults: Any) -> None:
        entries = [job | {"output": str(self.root / job["output"])} for job in jobs]
        self.jobs, self.defaults = jobs, {role: str(value) for role, value in defaults.items()}
        self.file.write_text(json.dumps({"defaults": self.defaults, "jobs": entries}))

    def part(self, part: str, **options: Any) -> list[Any]:
        return batch(self.file, part=part, quiet=True, **options)

    def finish(self, **options: Any) -> list[Any]:
        return finish(self.file, quiet=True, **options)

    def compare(self) -> None:
        assert contents(self.root) == self.whole
        assert all(verify(self.root / name) == [] for name in self.whole)

    def begun(self, output: str) -> list[str]:
        folder = self.root / f"{output}.parts"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def full(world: Any, shards: int = 4, layers: int = 3) -> dict[str, Path]:
    """Full checkpoints: aligned in shards of whole layers, as releases have them."""
    aligned = world.llama(layers, seed=1)
    folder = world.checkpoint("full", aligned)
    files = {n: f"model-{_shard(n, shards) + 1:05d}-of-{shards:05d}.safetensors" for n in aligned}
    for file in set(files.values()):
        save_file({n: t for n, t in aligned.items() if files[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    made = {"aligned": folder}
    for seed, role in enumerate(("unaligned", "finetuned")):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.2 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
        made[role] = world.checkpoint(role + "-full", moved)
    return made


def _shard(name: str, shards: int) -> int:
    number = next((int(part) + 1 for part in name.split(".") if part.isdigit()), 0)
    return shards - 1 if name.startswith(("lm_head", "model.norm")) else min(number, shards - 1)


JOBS: list[dict[str, Any]] = [
    {"method": "safemerge", "threshold": 0.7, "output": "merge", "safe_adapter": "SAFE"},
    {"method": "safelora", "num_layers": 5, "output": "lora"},
    {"method": "scale", "factor": 0.5, "output": "scale"},
]


@pytest.fixture
def adapters(world: Any, tmp_path: Path) -> Cluster:
    """Jobs on an adapter: a gate, a ranking, and a method that needs neither."""
    paths = world.trio(layers=3)
    safe = str(paths.pop("safe_adapter"))
    jobs = [{k: safe if v == "SAFE" else v for k, v in job.items()} for job in JOBS]
    return Cluster(tmp_path, jobs, **paths)


@pytest.fixture
def checkpoints(world: Any, tmp_path: Path) -> Cluster:
    """Jobs on full checkpoints of four shards: a ranking, and one that is element-wise."""
    jobs = [
        {"method": "safelora", "num_layers": 5, "output": "full"},
        {"method": "scale", "factor": 0.5, "output": "s"},
    ]
    return Cluster(tmp_path, jobs, **full(world))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes read of weights, by file: those of steps, and those copied inside the kernel."""
    counted: Counter[str] = Counter()
    readinto, copy = LocalSource.readinto, Writer.copy

    def spy(self: LocalSource, name: str, offset: int, view: memoryview) -> None:
        counted[f"{self.folder.name}/{name}"] += len(view) if threading.current_thread().name.startswith(WORKERS) else 0
        readinto(self, name, offset, view)

    def spy_copy(self: Writer, each: Any) -> None:
        counted[f"{Path(each.source.spec).name}/{each.ref.file}"] += each.ref.nbytes
        copy(self, each)

    monkeypatch.setattr(LocalSource, "readinto", spy)
    monkeypatch.setattr(Writer, "copy", spy_copy)
    return counted


WORKERS = ("reader", "worker")  # the names of the threads that do steps: planning reads headers besides


@pytest.mark.parametrize("count", [1, 2, 3, pytest.param(30, marks=pytest.mark.slow)])
def test_parts_make_the_bytes_of_one_machine(adapters: Cluster, count: int) -> None:
    for part in reversed(Part.all(count)):
        adapters.part(str(part))
        assert contents(adapters.root).keys().isdisjoint(adapters.whole)  # nothing looks finished
    adapters.finish()
    adapters.compare()


@pytest.mark.parametrize("count", [2, 4, pytest.param(9, marks=pytest.mark.slow)])
def test_parts_of_full_checkpoints(checkpoints: Cluster, count: int) -> None:
    for part in Part.all(count):
        checkpoints.part(str(part))
    checkpoints.finish()
    checkpoints.compare()


def test_a_shard_lies_in_one_part_where_there_are_as_many(checkpoints: Cluster) -> None:
    checkpoints.part("1/3"), checkpoints.part("2/3"), checkpoints.part("3/3")
    files = [path.name for path in sorted(checkpoints.root.glob("s.parts/*/*.safetensors.part"))]
    assert sorted(files) == sorted(set(files))
    assert len(files) == 4
    inodes = {path.name: path.stat().st_ino for path in checkpoints.root.glob("s.parts/*/*.safetensors.part")}
    checkpoints.finish()
    moved = {f"{path.name}.part": path.stat().st_ino for path in (checkpoints.root / "s").glob("*.safetensors")}
    assert moved == inodes  # nothing was copied
    checkpoints.compare()


@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_each_byte_is_read_once_over_all_parts(kind: str, reads: Counter[str], request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(kind)
    alone = Counter(reads)
    assert sum(alone.values()) > 0
    reads.clear()
    for part in Part.all(3):
        cluster.part(str(part))
    after_the_parts = Counter(reads)
    cluster.finish()
    inputs = Counter({name: count for name, count in reads.items() if "-of-3/" not in name})
    assert inputs == alone
    assert after_the_parts.total() > alone.total() // 2  # finish does what waited for a ranking, and no more


def test_the_manifest_counts_the_bytes_of_all_parts(world: Any, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [{"method": "scale", "factor": 0.5, "output": "one"}], **full(world))
    batch(cluster.file, quiet=True)
    alone = json.loads((cluster.root / "one/manifest.json").read_text())["run"]
    shutil.rmtree(cluster.root)
    for part in Part.all(3):
        cluster.part(str(part))
    cluster.finish()
    run = json.loads((cluster.root / "one/manifest.json").read_text())["run"]
    assert run["bytes_read"] == alone["bytes_read"]
    assert run["seconds"].keys() >= alone["seconds"].keys()


def test_a_ranking_is_decided_by_all_parts(adapters: Cluster) -> None:
    for part in ("1/3", "2/3"):
        merge, lora, scale = adapters.part(part)
        assert merge.record is not None
        assert scale.record is not None
        assert lora.record is None
        assert "unfinished" in repr(lora)
    assert all(each.record is not None for each in adapters.part("3/3"))  # which finds the others' numbers
    assert all(each.record is not None for each in adapters.part("1/3"))  # a second round, side by side
    adapters.finish()  # and what is left of it
    adapters.compare()


def test_duplicates_change_nothing(adapters: Cluster) -> None:
    adapters.part("1/2")
    before = {path: path.stat().st_mtime_ns for path in adapters.root.rglob("*.part")}
    adapters.part("1/2")
    lora = adapters.root / "lora.parts"
    assert {p: t for p, t in before.items() if lora not in p.parents} == {
        p: p.stat().st_mtime_ns for p in before if lora not in p.parents
    }
    adapters.part("2/2")
    adapters.finish()
    adapters.part("2/2")  # a pod that was started once more
    adapters.finish()
    adapters.compare()


def test_two_workers_at_one_part_at_once(adapters: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, then finds that all is done."""
    monkeypatch.setattr(parts_of_a_batch, "WAIT_SECONDS", 0.05)
    for _ in range(2):
        with ThreadPoolExecutor(4) as workers:
            list(workers.map(adapters.part, ["1/2", "1/2", "2/2", "2/2"]))  # raises where one failed
        adapters.finish()
        adapters.compare()
        shutil.rmtree(adapters.root)


def test_who_waits_goes_on_where_the_other_ended(adapters: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.part("2/2")
    folder = adapters.root / "merge.parts/1-of-2"
    monkeypatch.setattr(Writer, "complete", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.part("1/2")
    monkeypatch.undo()
    monkeypatch.setattr(parts_of_a_batch, "WAIT_SECONDS", 0.05)
    written: list[str] = []
    monkeypatch.setattr(Writer, "write", lambda self, name, tensor: written.append(name))
    with (folder / "journal.jsonl").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        worker = threading.Thread(target=adapters.part, args=("1/2",))
        worker.start()
        worker.join(0.3)
        assert worker.is_alive()
    worker.join()
    assert not written  # all tensors were there
    monkeypatch.undo()
    adapters.finish()
    adapters.compare()


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_missing_parts_are_named(adapters: Cluster) -> None:
    with pytest.raises(RequestError, match="merge: expected its parts, got none"):
        adapters.finish()
    adapters.part("2/4")
    with pytest.raises(RequestError) as refused:
        adapters.finish()
    assert "1/4, 3/4, 4/4" in str(refused.value)
    assert "2/4" not in str(refused.value)
    assert contents(adapters.root).keys().isdisjoint(adapters.whole)
    for part in ("1/4", "3/4", "4/4"):
        adapters.part(part)
    assert [each.manifest for each in adapters.finish(dry_run=True)] == [None] * 3
    adapters.finish()
    adapters.compare()


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "1", "1/0", "-1/4", "1/4/2", "1/100000", "٣/٤", ""])
def test_what_is_no_part_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError, match=r"--part: expected I/N, such as 2/8: .*count from 1"):
        batch(tmp_path / "jobs.yaml", part=text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": "1/2", "engine": "ray"}, "--part goes without --engine ray"),
        ({"parts": 3}, "--parts goes with --engine ray"),
        ({"parts": 0, "engine": "ray"}, "--parts: expected a number from 1"),
        ({"part": "1/2", "keep_going": True}, "--keep-going goes with a whole batch"),
        ({"engine": "slurm"}, "--engine: expected local or ray"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        batch(tmp_path / "jobs.yaml", **options)


def test_another_cut_is_refused_or_replaced(adapters: Cluster) -> None:
    adapters.part("1/2")
    with pytest.raises(RequestError, match="one of 3 parts, as those there, got parts of 2"):
        adapters.part("1/3")
    for part in Part.all(3):
        adapters.part(str(part), overwrite=True)
    assert adapters.begun("scale") == ["1-of-3", "2-of-3", "3-of-3"]
    adapters.finish()
    adapters.compare()


def _other_option(cluster: Cluster) -> None:
    jobs = [job | ({"factor": 0.25} if job["method"] == "scale" else {}) for job in cluster.jobs]
    cluster.write(jobs, **cluster.defaults)


def _other_input(cluster: Cluster) -> None:
    file = Path(cluster.defaults["adapter"]) / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _other_jobs(cluster: Cluster) -> None:
    adapter = Path(cluster.defaults["adapter"])
    pairs = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items() if ".layers.2." in n}
    heavy = shutil.copytree(adapter, adapter.with_name("heavy"))
    save_file(pairs, heavy / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((heavy / "adapter_config.json").read_text()) | {"layers_to_transform": [2]}
    (heavy / "adapter_config.json").write_text(json.dumps(config))
    more = [cluster.jobs[-1] | {"output": f"more-{number}", "adapter": str(heavy)} for number in range(8)]
    cluster.write([*cluster.jobs, *more], **cluster.defaults)


@pytest.mark.parametrize(
    ("change", "said"), [(_other_option, "options.factor"), (_other_input, "modified"), (_other_jobs, "of other jobs")]
)
def test_parts_of_different_requests_are_refused(
    adapters: Cluster, change: Callable[[Cluster], None], said: str
) -> None:
    adapters.write(adapters.jobs[2:], **adapters.defaults)
    adapters.part("1/2")
    change(adapters)
    with pytest.raises(RequestError) as other:
        adapters.part("1/2")  # of one request, and one of another
    assert "scale.parts/1-of-2" in str(other.value)
    adapters.part("2/2")
    with pytest.raises(RequestError) as refused:
        adapters.finish()
    assert said in str(refused.value)
    assert "scale: part 1/2" in str(refused.value)
    adapters.part("1/2", overwrite=True)
    adapters.finish()
    assert verify(adapters.root / "scale") == []


@pytest.mark.parametrize(("change", "said"), [(_other_input, "modified"), (_other_jobs, "modules in all parts")])
def test_numbers_of_different_requests_decide_nothing(
    adapters: Cluster, change: Callable[[Cluster], None], said: str
) -> None:
    adapters.part("1/2")
    change(adapters)
    with pytest.raises(RequestError, match="lora") as refused:
        adapters.part("2/2")
    assert said in str(refused.value)
    adapters.part("1/2", overwrite=True)
    adapters.part("2/2")
    adapters.finish()
    assert verify(adapters.root / "lora") == []


@pytest.mark.parametrize("key", ["safeshard", "torch", "device"])
def test_parts_of_different_machines_are_refused(adapters: Cluster, key: str) -> None:
    for part in Part.all(2):
        adapters.part(str(part))
    file = adapters.root / "scale.parts/2-of-2/part.json"
    record = json.loads(file.read_text())
    record["fingerprint"][key] = "another"
    file.write_text(json.dumps(record))
    with pytest.raises(RequestError, match=f"scale: part 2/2: {key}: expected .*, got .*another"):
        adapters.finish()


@pytest.mark.parametrize("damage", ["gone", "short", "flipped"])
def test_what_a_part_lost_is_made_again(adapters: Cluster, damage: str) -> None:
    adapters.write(adapters.jobs[2:], **adapters.defaults)
    adapters.whole = {"scale": adapters.whole["scale"]}
    for part in Part.all(2):
        adapters.part(str(part))
    (file,) = (adapters.root / "scale.parts/1-of-2").glob("*.safetensors.part")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-5] if damage == "short" else data)
    with pytest.raises(RunError, match=r"run the part again, --part 1/2"):
        adapters.finish()
    adapters.part("1/2")
    adapters.finish()
    adapters.compare()


def test_finish_that_is_interrupted_goes_on(checkpoints: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in Part.all(3):
        checkpoints.part(str(part))
    for method in ("adopt", "copy", "complete", "publish"):
        monkeypatch.setattr(Writer, method, _interrupted)
        if method == "copy":
            monkeypatch.undo()  # no shard is parted here
            continue
        with pytest.raises(KeyboardInterrupt):
            checkpoints.finish()
        monkeypatch.undo()
    for part in Part.all(3):
        checkpoints.part(str(part))  # a late duplicate finds that its shards have moved
    checkpoints.finish()
    checkpoints.compare()


def test_an_output_that_is_there_is_replaced_at_the_end_only(
    adapters: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch(adapters.file, quiet=True)
    kept = (adapters.root / "scale/adapter_model.safetensors").stat().st_ino
    for part in Part.all(2):
        assert adapters.part(str(part))[2].manifest is not None  # finished earlier: nothing to do
    for part in Part.all(2):
        adapters.part(str(part), overwrite=True)
    assert (adapters.root / "scale/adapter_model.safetensors").stat().st_ino == kept
    monkeypatch.setattr(FolderShelf, "clear", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.finish(overwrite=True)
    monkeypatch.undo()
    adapters.finish(overwrite=True)  # which was interrupted when its parts had become outputs
    assert (adapters.root / "scale/adapter_model.safetensors").stat().st_ino != kept
    adapters.compare()


def test_strict_is_kept(world: Any, tmp_path: Path) -> None:
    paths = world.trio()
    cluster = Cluster(tmp_path, [{"method": "safemerge", "threshold": -1, "output": "same"}], **paths)
    for part in Part.all(2):
        cluster.part(str(part), strict=True)
    with pytest.raises(RunError, match="nothing was changed"):
        cluster.finish(strict=True)
    assert contents(cluster.root).keys().isdisjoint(cluster.whole)
    cluster.finish()
    cluster.compare()


def test_a_link_in_the_place_of_the_parts_is_refused(adapters: Cluster, tmp_path: Path) -> None:
    adapters.root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (adapters.root / "scale.parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"scale\.parts: expected a folder"):
        adapters.part("1/2")
    assert not os.listdir(tmp_path / "elsewhere")  # noqa: PTH208


def test_what_is_not_ours_stays(adapters: Cluster) -> None:
    for part in Part.all(2):
        adapters.part(str(part))
    (adapters.root / "scale.parts/notes.txt").write_text("mine")
    adapters.finish()
    assert (adapters.root / "scale.parts/notes.txt").read_text() == "mine"


@pytest.fixture
def calibrated(llama: Any, tmp_path: Path) -> Cluster:
    """Calibrated jobs with saved factors: a leak, which depends on all modules, and a budget, which does not."""
    calibrate(
        aligned=str(llama.root / "aligned"), calibration=str(llama.data), samples=len(llama.lengths), percdamp=0.1,
        output=tmp_path / "factors", quiet=True,
    )  # fmt: skip
    jobs = [
        {"method": "ridge", "leak": 0.05, "output": "ridge"},
        {"method": "safedelta", "strength": 100, "block_size": 20, "output": "delta"},
        {"method": "ridge", "adapter": None, "finetuned": str(llama.root / "finetuned"), "output": "whole"},
    ]
    return Cluster(
        tmp_path, jobs, aligned=llama.root / "aligned", adapter=llama.adapter, factors=tmp_path / "factors",
        dtype="float32",
    )  # fmt: skip


def test_calibrated_jobs_with_saved_factors(calibrated: Cluster) -> None:
    waits = [each.record is None for part in Part.all(3) for each in calibrated.part(str(part))]
    assert waits == [True, False, True, True, False, True, False, False, False]
    calibrated.finish()
    calibrated.compare()


def test_a_leak_in_parts_with_a_head_that_has_none(calibrated: Cluster, llama: Any) -> None:
    """One part has nothing to measure."""
    folder = llama.make_adapter("with-head", target_modules=["q_proj", "lm_head"])
    jobs = [{"method": "ridge", "leak": 0.05, "output": "ridge"}]
    cluster = Cluster(calibrated.root.parent, jobs, **(calibrated.defaults | {"adapter": folder}))
    for part in Part.all(3):
        cluster.part(str(part))
    cluster.finish()
    cluster.compare()


def test_calibration_data_is_for_one_machine(llama: Any, tmp_path: Path) -> None:
    job = {"method": "ridge", "adapter": str(llama.adapter), "output": str(tmp_path / "out")}
    job |= {"aligned": str(llama.root / "aligned"), "calibration": str(llama.data)}
    (tmp_path / "jobs.yaml").write_text(json.dumps({"jobs": [job]}))
    with pytest.raises(RequestError, match="expected --factors, which all parts read"):
        batch(tmp_path / "jobs.yaml", part="1/2")
