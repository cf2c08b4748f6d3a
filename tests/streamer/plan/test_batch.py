"""Batches: the jobs file, one pass over the big checkpoints, and bytes that depend on nothing but the job."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeshard.manifests.errors import RequestError
from safeshard.streamer import batch, safelora, safemerge, scale
from safeshard.streamer.plan.request import jobs_file
from safeshard.streamer.plan.request.jobs_file import read_jobs
from safeshard.streamer.run import one_pass as run
from safeshard.streamer.run.flow import compute
from safeshard.streamer.sources import LocalSource

Write = Callable[[str], Path]
BASE = "defaults: {aligned: a, unaligned: u, safe_adapter: s, weights: [0.7, 0.3]}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str) -> Path:
        path = tmp_path / "jobs.yaml"
        path.write_text(text)
        return path

    return file


def test_matrix_and_defaults(write: Write) -> None:
    jobs = read_jobs(
        write(
            BASE
            + """
jobs:
  - method: safemerge
    matrix: {adapter: [x/alice, y/bob/], threshold: [0.3, 0.5], combine: [linear, exact]}
    output: out/{adapter}-{threshold}-{combine}
  - {method: safelora, adapter: x/alice, num_layers: 8, output: out/lora, dtype: float16}
"""
        )
    )
    assert [str(job.output) for job in jobs] == [
        *(f"out/{a}-{t}-{c}" for a in ("alice", "bob") for t in (0.3, 0.5) for c in ("linear", "exact")),
        "out/lora",
    ]
    assert jobs[5].model_dump() | {"adapter": "y/bob/", "threshold": 0.3, "combine": "exact"} == jobs[5].model_dump()
    assert jobs[5].settings()["weights"] == [0.7, 0.3]
    assert jobs[8].method == "safelora"  # to which the defaults of other methods do not apply
    assert jobs[8].settings()["num_layers"] == 8


def test_null_takes_a_default_away(write: Write) -> None:
    text = """
defaults: {aligned: a, unaligned: u, adapter: x, threshold: 0.4, dtype: float16}
jobs:
  - {method: safelora, threshold: null, num_layers: 3, output: one}
  - {method: safelora, adapter: null, finetuned: f, dtype: null, output: two}
"""
    one, two = read_jobs(write(text))
    assert (one.settings()["threshold"], one.settings()["num_layers"], one.dtype) == (None, 3, "float16")
    assert (two.adapter, two.finetuned, two.dtype, two.settings()["threshold"]) == (None, "f", None, 0.4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("jobs: []", "jobs"),
        ("[1, 2]", "jobs"),
        ("", "jobs"),
        ("jobs: {method: scale}", "jobs"),
        ("jobs: [1]", "job 1"),
        ("jobs: [{method: unheard-of}]", "unheard-of"),
        ("jobs: [{method: [scale]}]", "method"),
        ("jobs: [{output: x}]", "method"),
        ("job: []\njobs: [{method: scale}]", "job: expected"),
        ("defaults: {alinged: a}\njobs: [{method: scale}]", "defaults.alinged"),
        ("defaults: [a]\njobs: [{method: scale}]", "mapping"),
        ("jobs: [{method: scale, aligned: a, adapter: x, output: o, factor: 1, treshold: 2}]", "treshold"),
        ("jobs: [{method: scale, aligned: a, adapter: x, output: o, factor: .nan}]", "factor"),
        ("jobs: [{method: scale, aligned: a, adapter: x, output: o, factor: many}]", "factor"),
        ("jobs: [{method: scale, aligned: a, adapter: x, factor: 1}]", "output"),
        ("jobs: [{method: scale, aligned: a, adapter: x, factor: 1, output: 'o-{seed}'}]", "{seed}"),
        ("jobs: [{method: scale, aligned: a, adapter: x, factor: 1, output: 3}]", "output: expected a path, got 3"),
        ("jobs: [{method: scale, aligned: a, adapter: x, factor: 1, output: !!binary aGk=}]", "output: expected"),
        ("jobs: [{method: scale, matrix: {factor: 1}}]", "matrix"),
        ("jobs: [{method: scale, matrix: {factor: []}}]", "matrix"),
        ("jobs: [{method: scale, matrix: null}]", "matrix"),
        ("defaults: &d {aligned: a}\njobs: [{method: scale}, *d]", "aliases"),
        ("jobs: [{method: scale, method: safelora}]", "repeated"),
        ("jobs: [{method: scale, 3: x}]", "no name"),
        ("jobs: [{method: !!python/object/apply:os.system [ls]}]", "python/object"),
        ("jobs: [}", "valid YAML"),
        ("jobs: \x07", "valid YAML"),
        ("jobs: " + "[" * 50_000, "valid YAML"),
    ],
)
def test_malformed_files_are_refused(write: Write, text: str, named: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_jobs(write(text))
    assert named in str(refused.value)
    assert "jobs.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("jobs: [}", "line 1, column 8", "expected the node content, but found '}', while parsing a flow node"),
        ("jobs:\n  - method: scale\n   output: x", "line 3, column 4", "expected <block end>"),
        ("jobs:\n\t- method: scale", "line 2, column 1", "character '\\t' that cannot start any token"),
        ("jobs: [{method: scale, method: safelora}]", "line 1, column 24", "key 'method' is repeated or no name"),
    ],
)
def test_broken_yaml_is_named_by_line_and_column(write: Write, text: str, place: str, problem: str) -> None:
    file = write(text)
    with pytest.raises(RequestError) as refused:
        read_jobs(file)
    (offence,) = refused.value.offences
    assert offence.where == f"{file}, {place}"
    assert problem in offence.got
    assert "byte string" not in str(refused.value)
    assert "^" not in str(refused.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.yaml"):
        read_jobs(tmp_path / "none.yaml")


def test_every_malformed_job_is_listed(write: Write) -> None:
    text = (
        BASE
        + """
extra: 1
jobs:
  - {method: safemerge, adapter: x, threshold: high, output: one}
  - {method: safemerge, adapter: x, matrix: {threshold: [0.1, low, .inf]}, output: 'two-{threshold}'}
  - {method: unknown, output: three}
  - {method: safelora, adapter: x, output: four}
  - {method: scale, adapter: x, factor: 0.5, output: five}
"""
    )
    with pytest.raises(RequestError) as refused:
        read_jobs(write(text))
    message = str(refused.value)
    assert [message.count(f"job {n}:") for n in range(1, 6)] == [1, 2, 1, 1, 0]
    assert "extra" in message


def test_what_else_is_wrong_is_said_beside_a_malformed_job(write: Write) -> None:
    """Outputs of one name, and options that no method has: not once the first mistake is mended."""
    text = """
defaults: {aligned: a, adapter: x, factor: 0.5}
jobs:
  - {method: scale, output: out/one}
  - {method: scale, output: ./out/../out/one}
  - {method: scale, output: out/two}
  - {method: scales, treshold: 1, threshold: 1, output: out/three}
"""
    with pytest.raises(RequestError) as refused:
        read_jobs(write(text))
    assert [(o.where.rpartition("/")[2], o.what, o.got) for o in refused.value.offences] == [
        ("jobs.yaml: job 4", "method", "'scales'"),
        ("jobs.yaml: job 4", "treshold", "an unknown one"),
        ("--output", "out/one", "another job's"),
        ("--output", "out/../out/one", "another job's"),
    ]


def test_a_matrix_that_would_fill_memory_is_refused_at_once(write: Write) -> None:
    lists = ", ".join(f"{key}: [{', '.join('1' * 60)}]" for key in ("threshold", "seed", "rank", "density", "weights"))
    with pytest.raises(RequestError, match=f"at most {jobs_file.MAX_JOBS} jobs"):
        read_jobs(write(f"jobs: [{{method: safemerge, output: o, matrix: {{{lists}}}}}]"))


class Bench:
    """A world with two more adapters (of another rank and dtype, on fewer modules), and its batch of many jobs."""

    def __init__(self, world: Any, load_tensors: Any) -> None:
        self.root: Path = world.root
        self.paths = world.trio(shards=3)
        aligned = load_tensors(self.paths["aligned"])
        half = {n: t for n, t in aligned.items() if "q_proj" in n or "up_proj" in n}
        self.paths["bob"] = world.adapter("bob", half, 7, 5, target_modules=["q_proj", "up_proj"], dtype=torch.bfloat16)
        self.paths["carol"] = world.adapter("carol", aligned, 1, seed=6)
        generator = torch.Generator().manual_seed(8)
        moved = {n: t + 0.1 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in aligned.items()}
        self.paths["finetuned"] = world.checkpoint("finetuned", moved)

    def jobs(self) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
        base = {role: str(self.paths[role]) for role in ("aligned", "unaligned")}
        jobs: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
        for name in ("adapter", "bob", "carol"):
            tuned = base | {"adapter": str(self.paths[name])}
            for threshold in (0.08, 0.2):
                jobs[f"lora-{name}-{threshold}"] = safelora, tuned | {"threshold": threshold}
            jobs[f"number-{name}"] = safelora, tuned | {"num_layers": 2}
            safe = tuned | {"safe_adapter": str(self.paths["safe_adapter"]), "threshold": 1.01}
            jobs[f"exact-{name}"] = safemerge, safe | {"combine": "exact"}
            jobs[f"svd-{name}"] = safemerge, safe | {"combine": "svd"}
        safe = base | {"adapter": str(self.paths["adapter"]), "safe_adapter": str(self.paths["safe_adapter"])}
        jobs["dare"] = safemerge, safe | {"combine": "dare_linear", "density": 0.5, "threshold": 1.01, "seed": 3}
        full = {"finetuned": str(self.paths["finetuned"])}
        jobs["full"] = safelora, base | full | {"threshold": 1.01}
        jobs["half"] = scale, {"aligned": base["aligned"], "factor": 0.5} | full
        return jobs

    def run_batch(self, folder: str, names: list[str], **options: Any) -> Path:
        jobs = self.jobs()
        entries = [
            {"method": jobs[name][0].__name__, "output": str(self.root / folder / name)} | jobs[name][1]
            for name in names
        ]
        file = self.root / f"{folder}.yaml"
        file.write_text(json.dumps({"jobs": entries}))
        batch(file, quiet=True, **options)
        return self.root / folder


@pytest.fixture
def bench(world: Any, load_tensors: Any) -> Bench:
    return Bench(world, load_tensors)


def weights_of(folder: Path) -> dict[str, bytes]:
    """Every file of an output but the manifest and the card that is made of it."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("manifest.json", "README.md")}


def decided(folder: Path) -> Any:
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["modules"], manifest["tensors"], manifest["method"]


def test_a_batch_gives_the_bytes_of_its_jobs_alone(bench: Bench) -> None:
    together = bench.run_batch("together", list(bench.jobs()))
    for name, (function, options) in bench.jobs().items():
        alone = function(**options, output=bench.root / "alone" / name, quiet=True).output
        assert weights_of(alone) == weights_of(together / name), name
        assert decided(alone) == decided(together / name), name


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("memory", ["24MiB", "1GiB"])
def test_order_workers_and_memory_change_no_byte(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, workers: int, memory: str
) -> None:
    names = list(bench.jobs())
    first = bench.run_batch("first", names)
    monkeypatch.setattr(run, "workers_for", lambda device: workers)
    second = bench.run_batch("second", names[::-1], memory=memory)
    for name in names:
        assert weights_of(first / name) == weights_of(second / name), name
        assert decided(first / name) == decided(second / name), name


def test_a_gate_is_computed_once_for_all_thresholds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = compute.lora_gate

    def counted(aligned: Any, unaligned: Any, adapters: Any, **options: Any) -> Any:
        calls.append(len(adapters))
        return original(aligned, unaligned, adapters, **options)

    monkeypatch.setattr(compute, "lora_gate", counted)
    names = [n for n in bench.jobs() if n.startswith(("lora", "exact", "svd"))]
    bench.run_batch("out", names)
    assert sorted(calls) == [2] * 10 + [3] * 4  # one pass a module over all distinct adapters; bob has 4 of 14 modules


def test_each_tensor_of_the_big_checkpoints_is_read_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[str, str, int]] = Counter()
    original = LocalSource.readinto

    def counted(self: LocalSource, name: str, offset: int, view: memoryview) -> None:
        reads[Path(self.spec).name, name, offset] += name.endswith(".safetensors")
        original(self, name, offset, view)

    names = [n for n in bench.jobs() if not n.startswith("number")]
    monkeypatch.setattr(LocalSource, "readinto", counted)
    plans: list[Any] = []
    monkeypatch.setattr(run.Pass, "execute", _after(reads.clear, run.Pass.execute, plans))
    bench.run_batch("out", names)
    assert plans
    big = {key: n for key, n in reads.items() if n and key[0] in ("aligned", "unaligned", "finetuned")}
    assert len([key for key in big if key[0] == "unaligned"]) == 14
    assert set(big.values()) == {1}
    assert {n for key, n in reads.items() if n and key[0] in ("adapter", "bob", "carol")} == {1}


def _after(clear: Callable[[], None], execute: Callable[..., None], seen: list[Any]) -> Callable[..., None]:
    """`execute`, once what the plan read is forgotten and the end of the pass noted."""

    def wrapped(self: Any, runs: Any) -> None:
        clear()
        execute(self, runs)
        seen.append(runs)

    return wrapped


def test_bytes_read_grow_only_by_the_adapters(bench: Bench) -> None:
    def read(folder: Path, name: str) -> int:
        return int(json.loads((folder / name / "manifest.json").read_text())["run"]["bytes_read"])

    one = read(bench.run_batch("one", ["lora-adapter-0.2"]), "lora-adapter-0.2")
    names = [n for n in bench.jobs() if n.startswith("lora")]
    many = read(bench.run_batch("many", names), names[-1])
    adapters = sum((bench.paths[n] / "adapter_model.safetensors").stat().st_size for n in ("adapter", "bob", "carol"))
    assert many - one < 2 * adapters


def test_every_job_that_cannot_run_is_reported_and_none_runs(bench: Bench, write: Write) -> None:
    (bench.root / "taken").mkdir()
    good = bench.jobs()["lora-adapter-0.2"][1] | {"method": "safelora"}
    jobs = [
        good | {"output": str(bench.root / "good")},
        good | {"output": str(bench.root / "taken")},
        good | {"output": str(bench.root / "missing"), "adapter": str(bench.root / "nobody")},
        good | {"output": str(bench.root / "same"), "unaligned": good["aligned"]},
        good | {"output": str(bench.root / "good")},
    ]
    with pytest.raises(RequestError) as refused:
        batch(write(json.dumps({"jobs": jobs})), quiet=True)
    message = str(refused.value)
    for named in ("taken", "nobody", "another checkpoint than --aligned", "a folder of its own"):
        assert named in message
    assert not list(bench.root.glob("*.partial"))
    assert not (bench.root / "good").exists()


def test_unfinished_outputs_of_other_requests_are_all_reported(bench: Bench, write: Write) -> None:
    jobs = []
    for number in range(3):
        out = bench.root / f"out{number}"
        (bench.root / f"out{number}.partial").mkdir()
        if number:
            (bench.root / f"out{number}.partial/notes.txt").write_text("mine")
        jobs.append(bench.jobs()["lora-adapter-0.2"][1] | {"method": "safelora", "output": str(out)})
    with pytest.raises(RequestError) as refused:
        batch(write(json.dumps({"jobs": jobs})), quiet=True)
    assert len(refused.value.offences) == 2
    assert sorted(p.name for p in bench.root.glob("out*")) == [f"out{number}.partial" for number in range(3)]


MANY = """
import resource, sys
from safeshard.streamer import batch
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(len(batch(sys.argv[1], quiet=True)))
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 400, reason="the hard limit is too low")
def test_more_jobs_than_open_files_allowed_by_default(bench: Bench, write: Write, python: str) -> None:
    entry = {"method": "scale", "aligned": str(bench.paths["aligned"]), "adapter": str(bench.paths["adapter"])}
    entry |= {"matrix": {"factor": [n / 50 for n in range(50)]}, "output": f"{bench.root}/many/{{factor}}"}
    file = write(json.dumps({"jobs": [entry]}))
    finished = subprocess.run([python, "-c", MANY, file], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "50\n"), finished.stderr


def test_a_batch_that_ended_between_two_outputs_goes_on(world: Any, load_tensors: Any) -> None:
    paths = world.trio()
    jobs = world.root / "jobs.json"  # JSON is YAML
    entries = [{"method": "scale", "factor": f, "output": str(world.root / f"out-{f}")} for f in (0.25, 0.5)]
    defaults = {"aligned": str(paths["aligned"]), "adapter": str(paths["adapter"])}
    jobs.write_text(json.dumps({"defaults": defaults, "jobs": entries}))
    batch(jobs, quiet=True)
    kept = (world.root / "out-0.25" / "manifest.json").read_bytes()
    expected = load_tensors(world.root / "out-0.5")
    shutil.rmtree(world.root / "out-0.5")
    results = batch(jobs, quiet=True)
    assert (world.root / "out-0.25" / "manifest.json").read_bytes() == kept
    assert all(torch.equal(t, expected[n]) for n, t in load_tensors(world.root / "out-0.5").items())
    assert [r.manifest is not None for r in results] == [True, True]
    entries[0]["factor"] = 0.3  # another request: what is there is not its output
    jobs.write_text(json.dumps({"defaults": defaults, "jobs": entries}))
    shutil.rmtree(world.root / "out-0.5")
    with pytest.raises(RequestError, match="exists"):
        batch(jobs, quiet=True)


@pytest.mark.parametrize("second", ["out/inner", "out.partial", "out"])
def test_outputs_may_not_stand_in_each_others_way(world: Any, second: str) -> None:
    paths = world.trio()
    jobs = world.root / "jobs.json"
    entries = [{"method": "scale", "factor": 0.5, "output": str(world.root / name)} for name in ("out", second)]
    defaults = {"aligned": str(paths["aligned"]), "adapter": str(paths["adapter"])}
    jobs.write_text(json.dumps({"defaults": defaults, "jobs": entries}))
    with pytest.raises(RequestError, match="a folder of its own"):
        batch(jobs, quiet=True)
