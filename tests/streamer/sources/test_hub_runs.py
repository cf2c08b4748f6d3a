"""Whole runs against the stand-in Hub: bytes, dry runs, signals, kills, work offline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import reload_hub
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError, RunError
from safeshard.manifests.schema import Manifest, load
from safeshard.streamer import safemerge
from safeshard.streamer.cli import messages


class Job:
    """A SafeMERGE job of four repositories."""

    def __init__(self, world: Any, hub: StandinHub, root: Path) -> None:
        self.root, self.hub = root, hub
        world.sizes = {"hidden": 192, "kv": 96, "inner": 256}
        self.trio: dict[str, Path] = world.trio(shards=3, layers=4)
        for role, path in self.trio.items():
            hub.add(f"org/{role}", path)

    def run(self, output: str, place: str = "hf://org", **options: Any) -> Manifest:
        result = safemerge(
            **{role: f"{place}/{role}" for role in self.trio}, output=self.root / output, quiet=True, **options
        )
        return load(result.output)

    def plan(self, **options: Any) -> dict[str, Any]:
        result = safemerge(
            **{role: f"hf://org/{role}" for role in self.trio}, output=self.root / "dry", dry_run=True, **options
        )
        said: dict[str, Any] = messages.outcome(result)["download"]
        return said | {"said": messages.plan([result.plan], 1 << 30, "cpu")}

    def start(self, output: str, *more: str) -> subprocess.Popen[str]:
        roles = [part for role in self.trio for part in (f"--{role.replace('_', '-')}", f"hf://org/{role}")]
        words = [sys.executable, "-m", "safeshard", "safemerge", *roles, "--output", output, *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=os.environ.copy(), cwd=self.root, stdout=pipe, stderr=pipe, text=True)

    def adapter(self, output: str) -> bytes:
        return (self.root / output / "adapter_model.safetensors").read_bytes()

    def sent(self) -> int:
        """Bytes of content since the last call."""
        return sum(r.sent for r in self.hub.taken() if r.name)

    def shards_kept(self) -> int:
        """Bytes of the checkpoints' shards in the Hub's cache."""
        blobs = (p for name in ("aligned", "unaligned") for p in self.cache(f"models--org--{name}/blobs/*"))
        return sum(p.stat().st_size for p in blobs if len(p.name) == 64)

    def cache(self, pattern: str) -> list[Path]:
        return sorted((self.root / "cache" / "hub").glob(pattern))

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def job(world: Any, empty_hub: StandinHub, tmp_path: Path) -> Job:
    return Job(world, empty_hub, tmp_path)


def test_a_run_reads_what_it_computes_with_and_keeps_nothing(job: Job) -> None:
    manifest = job.run("online")
    assert manifest.run.bytes_read <= job.sent() <= 1.05 * manifest.run.bytes_read
    assert job.shards_kept() == 0
    checked = {(role, f.checked) for role, given in manifest.inputs.items() for f in given.files if f.header_sha256}
    roles = {"aligned": "ranges", "unaligned": "ranges", "adapter": "hash", "safe_adapter": "hash"}
    assert checked == set(roles.items())


def test_a_dry_run_says_what_is_to_come(job: Job) -> None:
    said = job.plan()
    assert "to download" in said["said"]
    job.sent()
    job.run("out")
    assert 1.0 <= job.sent() / said["nbytes"] <= 1.05
    assert said["kept"] == 0
    said = job.plan(cache=True)
    job.sent()
    job.run("other", cache=True)
    assert said["nbytes"] <= job.sent() <= 1.05 * said["nbytes"]
    assert job.shards_kept() <= said["kept"] <= sum(p.stat().st_size for p in job.cache("models--*/blobs/*"))
    assert said["largest"] == max(p.stat().st_size for p in job.trio["aligned"].iterdir())
    assert "to download" not in job.plan()["said"]  # all of it is in the cache


def test_what_does_not_fit_is_refused_at_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"--cache-budget: expected at least .*read by ranges"):
        job.plan(cache_budget="100kB")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 500_000}))
    with pytest.raises(RequestError, match=r"--cache: .*/hub: expected .* of free space.*hf cache rm"):
        job.plan(cache=True)
    assert job.shards_kept() == 0


def test_a_budget_bounds_what_is_kept(job: Job) -> None:
    budget = 2 * max(p.stat().st_size for p in job.trio["aligned"].iterdir())
    job.run("out", cache_budget=str(budget))
    assert 0 < job.shards_kept() <= budget
    job.run("plain")
    assert job.adapter("out") == job.adapter("plain")


def test_a_damaged_shard_is_noticed(
    job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache by its hash, before anything of it is used."""
    job.run("first", cache=True)
    blob = job.cache("models--org--aligned/snapshots/*/model-00002*")[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-5] + b"\x55" * 5)
    job.run("second")
    assert f"damaged and left alone; remove it: {blob}" in caplog.text
    assert job.adapter("first") == job.adapter("second")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reload_hub(monkeypatch)
    with pytest.raises(RunError, match=f"remove {blob}"):
        job.run("third")
    assert not (job.root / "third").exists()


def test_a_run_that_was_begun_online_goes_on_offline(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.run("whole", cache=True)
    monkeypatch.setattr("safeshard.streamer.write.writer.Writer.publish", _fail)
    with pytest.raises(RunError, match="the power"):
        job.run("out", cache=True)
    monkeypatch.undo()
    job.hub.close()
    for blob in job.cache("models--*/blobs/*"):
        os.utime(blob, (1, 1))  # copied by hand to another disk, say
    monkeypatch.setenv("HF_HOME", str(job.root / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reload_hub(monkeypatch)
    manifest = job.run("out")
    assert manifest.run.bytes_read == 0  # all was done before
    assert job.adapter("out") == job.adapter("whole")


def _fail(*_: object) -> None:
    raise RunError("the power went")


def test_a_flaky_hub_is_survived(job: Job) -> None:
    for fault in ({"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}):
        job.hub.fail("/api/models/", times=1, **fault)
        job.hub.fail("/resolve/", times=2, **fault)
        job.hub.fail("/cdn/", times=2, **fault)
    job.hub.fail("/cdn/", "reset", after=7, times=3)
    job.hub.fail("/cdn/", "truncate", after=3, times=3)
    job.run("out")
    job.run("plain")
    assert job.adapter("out") == job.adapter("plain")


def test_an_error_ends_what_else_is_under_way(job: Job) -> None:
    job.plan()
    job.hub.fail(r"/(resolve|cdn)/.*unaligned.*/model-00003", status=404)
    job.hub.fail(r"/cdn/.*aligned/model-0000[12]", "stall")
    started = time.monotonic()
    with pytest.raises(RunError, match="check the name"):
        job.run("out")
    assert time.monotonic() - started < 10  # no stall is waited for, of 30 seconds each


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--cache",)])
@pytest.mark.parametrize("when", ["plan", "run"])
def test_a_signal_ends_a_stalled_download(job: Job, more: tuple[str, ...], when: str) -> None:
    if when == "run":
        job.plan()  # headers are through
        fault = job.hub.fail(r"/cdn/.*aligned/model-0000[123]", "stall", after=5)
    else:
        fault = job.hub.fail("/api/models/org/unaligned", status=503, headers={"Retry-After": "300"})
    times = fault.times
    process = job.start("out", *more)
    job.wait(lambda: fault.times < times)
    time.sleep(1.0)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - started < 2.0
    assert process.returncode == 1
    assert "interrupted by SIGTERM" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_is_not_used_again(job: Job) -> None:
    fault = job.hub.fail(r"/cdn/.*unaligned/model-00002", "stall", after=50_000)
    times = fault.times
    process = job.start("out", "--cache")
    job.wait(lambda: fault.times < times)
    process.kill()
    process.communicate()
    job.hub.faults.clear()
    job.run("out", cache=True)
    assert not [p for p in job.root.rglob("*") if p.name.endswith((".part", ".incomplete", ".partial"))]
    job.run("plain")
    assert job.adapter("out") == job.adapter("plain")
