"""A service's day in small: adapters by pattern from a bucket or the Hub, new ones only, results written afar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in_bucket import StandinBucket
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError
from safeshard.streamer import verify
from safeshard.streamer.cli.app import main
from safeshard.streamer.plan.request.jobs_file import jobs_of
from safeshard.streamer.sources import matching

TOKEN = "hf_verysecrettoken"
SMALL = {"hidden": 16, "kv": 8, "inner": 24}


@pytest.fixture
def hub(empty_hub: StandinHub, monkeypatch: pytest.MonkeyPatch, world: Any) -> StandinHub:
    """The stand-in Hub with the big models, and a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    empty_hub.writes.token = TOKEN
    world.sizes = SMALL
    for role, folder in world.trio(layers=1).items():
        empty_hub.add(f"org/{role.replace('_', '-')}", folder)
    return empty_hub


def adapters(world: Any, *names: str) -> dict[str, Path]:
    base = world.llama(1, seed=1)
    return {name: world.adapter(f"customers/{name}", base, seed=n) for n, name in enumerate(names)}


def jobs_file(world: Any, **job: str) -> Path:
    defaults = {
        "aligned": "hf://org/aligned",
        "unaligned": "hf://org/unaligned",
        "safe_adapter": "hf://org/safe-adapter",
    }
    file: Path = world.root / "day.yaml"
    file.write_text(json.dumps({"defaults": defaults, "jobs": [{"method": "safemerge", "threshold": 0.3} | job]}))
    return file


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_day_with_a_bucket(hub: StandinHub, bucket: StandinBucket, world: Any, capsys: Any) -> None:
    """The broken one is named and keeps no other back; the next run takes what is new, and what failed."""
    for name, folder in adapters(world, "alice", "bob", "broken").items():
        if name == "broken":
            (folder / "adapter_config.json").write_text("{")
        bucket.add(f"adapters/{name}", folder)
    jobs = jobs_file(world, adapter="s3://models/adapters/*", output="s3://models/defended/{adapter}")
    assert run("batch", jobs, "--keep-going") == 1
    shown = capsys.readouterr()
    assert "safeshard: 1 of 3 jobs failed" in shown.err
    assert "failed: s3://models/defended/broken: s3://models/adapters/broken/adapter_config.json" in shown.err
    assert "SafeMERGE: s3://models/defended/alice" in shown.out
    assert "very-secret" not in shown.out + shown.err
    for name in ("alice", "bob"):
        assert verify(f"s3://models/defended/{name}") == []
    assert bucket.names("defended/broken") == {}

    bucket.add("adapters/carol", adapters(world, "carol")["carol"])
    bucket.taken()
    assert run("batch", jobs, "--keep-going", "--skip-finished") == 1
    shown = capsys.readouterr()
    assert "2 of 4 jobs are finished already" in shown.out
    assert "SafeMERGE: s3://models/defended/carol" in shown.out
    assert "alice" not in shown.out
    assert not [a for a in bucket.taken() if "adapters/alice/" in a.path]
    assert verify("s3://models/defended/carol") == []

    (world.root / "customers/broken/adapter_config.json").write_text(
        (world.root / "customers/alice/adapter_config.json").read_text()
    )
    bucket.add("adapters/broken", world.root / "customers/broken")
    assert run("batch", jobs, "--keep-going", "--skip-finished") == 0
    assert verify("s3://models/defended/broken") == []
    capsys.readouterr()
    assert run("batch", jobs, "--keep-going", "--skip-finished") == 0
    assert capsys.readouterr().out.strip() == "4 of 4 jobs are finished already"


def test_a_day_with_the_hub(hub: StandinHub, world: Any, capsys: Any) -> None:
    """A namespace in, private repositories out."""
    for name, folder in adapters(world, "alice", "bob").items():
        hub.add(f"customers/{name}-lora", folder)
    hub.add("customers/other", world.root / "aligned")
    jobs = jobs_file(world, adapter="hf://customers/*-lora", push="defended/{adapter}")
    assert run("batch", jobs) == 0
    for name in ("alice", "bob"):
        assert hub.writes.private[f"defended/{name}-lora"]
        assert verify(f"hf://defended/{name}-lora") == []
    assert TOKEN not in "".join(capsys.readouterr())
    hub.taken()
    assert run("batch", jobs, "--skip-finished", "--json") == 0
    assert capsys.readouterr().out.strip() == "[]"
    assert not [r for r in hub.taken() if r.method == "POST"]


class TestPatterns:
    def test_local_folders(self, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        made = adapters(world, "b", "a")
        (world.root / "customers/notes.txt").write_text("")
        monkeypatch.chdir(world.root)
        assert matching("customers/*") == ["customers/a", "customers/b"]
        job = {"method": "scale", "aligned": "x", "factor": 0.5, "adapter": "customers/*", "output": "out/{adapter}"}
        assert [str(job.output) for job in jobs_of({"jobs": [job]}, "jobs")] == ["out/a", "out/b"]
        (world.root / "customers/[x]").mkdir()
        job["adapter"] = "customers/[x]"  # a folder of that name
        assert [job.adapter for job in jobs_of({"jobs": [job]}, "jobs")] == ["customers/[x]"]  # type: ignore[attr-defined]
        assert made["a"].is_dir()

    def test_within_a_matrix(self, world: Any) -> None:
        adapters(world, "a", "b")
        root = world.root / "customers"
        job = {
            "method": "scale", "aligned": "x", "output": "out/{adapter}-{factor}",
            "matrix": {"adapter": [f"{root}/*", f"{root}/a"], "factor": [0.5, 1.0]},
        }  # fmt: skip
        names = [str(job.output) for job in jobs_of({"jobs": [job]}, "jobs")]
        assert names == ["out/a-0.5", "out/a-1.0", "out/b-0.5", "out/b-1.0"]

    def test_a_bucket_lists_folders_alone(self, bucket: StandinBucket) -> None:
        for name in ("a/x", "b/x", "b/deep/x", "file"):
            bucket.put(f"adapters/{name}", b"")
        assert matching("s3://models/adapters/*") == ["s3://models/adapters/a", "s3://models/adapters/b"]
        assert matching("s3://models/adapters/b*/") == ["s3://models/adapters/b"]

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("nowhere/*", "at least one folder or repository that matches, got none"),
            ("s3://models/*/x", "wildcards in the last part alone"),
            ("s3://models/none/*", "at least one folder"),
            ("https://host/x/*", "a folder, s3://, gs://, az:// or hf://org/pattern"),
        ],
    )
    def test_refusals(self, bucket: StandinBucket, pattern: str, words: str) -> None:
        with pytest.raises(RequestError, match=words):
            matching(pattern)
