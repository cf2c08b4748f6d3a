"""Outputs pushed to the stand-in Hub: private, shards first, one commit, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer import batch, inspect, report, safemerge, verify

SECRET = "hf_verysecrettoken"
REPO = "me/safe"


@pytest.fixture
def hub(empty_hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> StandinHub:
    """The stand-in Hub with a token that may write; large files go by LFS."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    empty_hub.writes.token = SECRET
    return empty_hub


@pytest.fixture
def job(world: Any) -> dict[str, Any]:
    paths: dict[str, Any] = world.trio(layers=1)
    return paths | {"quiet": True, "memory": "64MiB"}


def without_run(files: dict[str, bytes]) -> dict[str, Any]:
    manifest = json.loads(files["manifest.json"])
    return files | {"manifest.json": {k: v for k, v in manifest.items() if k not in ("run", "blake3")}}


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestPush:
    def test_without_a_local_output(
        self, hub: StandinHub, job: dict[str, Any], world: Any, work: Path, caplog: Any
    ) -> None:
        """One commit, private, the bytes of a local run; the token stays out of everything."""
        caplog.set_level(logging.DEBUG)
        safemerge(**job, output=world.root / "local")
        result = safemerge(**job, push=REPO)
        assert result.output == f"hf://{REPO}"
        assert without_run(hub.content(REPO)) == without_run(local(world.root / "local"))
        assert hub.writes.private[REPO]
        assert hub.commits(REPO) == 2
        assert hub.writes.messages == ["SafeMERGE by safeshard"]
        assert list(work.iterdir()) == []
        assert all(SECRET.encode() not in data for data in hub.content(REPO).values())
        assert SECRET not in caplog.text
        assert SECRET not in repr(result)
        asked = [r.path for r in hub.taken() if r.method in ("POST", "PUT")]
        assert asked.index(next(p for p in asked if p.startswith("/lfs/"))) < asked.index(
            f"/api/models/{REPO}/commit/main"
        )

    def test_beside_a_local_output(self, hub: StandinHub, job: dict[str, Any], world: Any) -> None:
        result = safemerge(**job, output=world.root / "out", push=f"hf://{REPO}")
        assert result.output == world.root / "out"
        assert hub.content(REPO) == local(world.root / "out")

    def test_what_reads_it(self, hub: StandinHub, job: dict[str, Any], world: Any, monkeypatch: Any) -> None:
        safemerge(**job, output=world.root / "out", push=REPO)
        assert verify(f"hf://{REPO}") == []
        assert inspect(f"hf://{REPO}") == inspect(world.root / "out")
        monkeypatch.chdir(world.root)
        assert report(f"hf://{REPO}") == Path("safe.report.html")
        assert f"hf://{REPO}" in Path("safe.report.html").read_text()

    def test_public_wants_a_licence(self, hub: StandinHub, job: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match=r"--public: me/safe: expected a licence in the model card|--public"):
            safemerge(**job, push=REPO, public=True)
        assert hub.commits(REPO) == 0
        (job["aligned"] / "README.md").write_text("---\nlicense: mit\n---\n")
        safemerge(**job, push=REPO, public=True)
        assert not hub.writes.private[REPO]
        assert b"license: mit" in hub.content(REPO)["README.md"]

    def test_a_batch_of_pushes(self, hub: StandinHub, job: dict[str, Any], world: Any) -> None:
        paths = {k: str(v) for k, v in job.items() if k not in ("quiet", "memory", "adapter")}
        entry = {"method": "safemerge", "adapter": str(job["adapter"]), "push": "me/{adapter}-safe"}
        (world.root / "jobs.yaml").write_text(json.dumps({"defaults": paths, "jobs": [entry]}))
        batch(world.root / "jobs.yaml", quiet=True)
        assert "manifest.json" in hub.content("me/adapter-safe")
        hub.taken()
        (result,) = batch(world.root / "jobs.yaml", quiet=True)
        assert result.plan.finished is not None
        assert not [r for r in hub.taken() if r.method == "POST"]


class TestRefusals:
    def test_without_a_token(self, hub: StandinHub, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RequestError, match=r"log in .`hf auth login`, or HF_TOKEN"):
            safemerge(**job, push=REPO)

    def test_a_token_that_may_not_write(self, hub: StandinHub, job: dict[str, Any], work: Path) -> None:
        """Found out before anything is computed."""
        hub.writes.token = "another"
        with pytest.raises(RunError, match=r"use credentials that may write there"):
            safemerge(**job, push=REPO)
        assert not list(work.glob("*"))

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_foreign_repository(self, hub: StandinHub, job: dict[str, Any], world: Any, overwrite: bool) -> None:
        hub.add(REPO, job["aligned"])
        hub.writes.private[REPO] = True
        with pytest.raises(RequestError, match=r"safeshard did not write: config.json, model.safetensors"):
            safemerge(**job, push=REPO, overwrite=overwrite)
        assert hub.commits(REPO) == 1

    def test_a_public_repository_is_no_private_place(self, hub: StandinHub, job: dict[str, Any], world: Any) -> None:
        (world.root / "empty").mkdir()
        hub.add(REPO, world.root / "empty")
        with pytest.raises(RunError, match=r"me/safe is public .choose another, or give --public"):
            safemerge(**job, push=REPO)

    def test_a_finished_one(self, hub: StandinHub, job: dict[str, Any]) -> None:
        safemerge(**job, push=REPO)
        again = safemerge(**job, push=REPO)  # the same request: nothing is left to do
        assert again.plan.finished is not None
        with pytest.raises(RequestError, match=r"one is there .choose another, or --overwrite"):
            safemerge(**job, push=REPO, threshold=0.6)
        safemerge(**job, push=REPO, threshold=0.6, overwrite=True)
        assert json.loads(hub.content(REPO)["manifest.json"])["method"]["options"]["threshold"] == 0.6
        assert hub.commits(REPO) == 3

    @pytest.mark.parametrize(
        "options", [{"public": True, "output": "out"}, {"push": REPO, "output": "s3://b/x"}, {"push": "no-namespace"},
                    {"push": "a/b@rev"}, {}],
    )  # fmt: skip
    def test_options_that_make_no_sense(self, job: dict[str, Any], options: dict[str, Any]) -> None:
        with pytest.raises(
            RequestError, match=r"--public goes with --push|--push goes with|org/name|--output: expected a"
        ):
            safemerge(**job, **options)


class TestFaults:
    """Each row of the table of writes in docs/remote.md that is about the Hub."""

    def test_a_commit_whose_answer_was_lost(self, hub: StandinHub, job: dict[str, Any]) -> None:
        hub.fail(f"/api/models/{REPO}/commit", "lost", times=1)
        safemerge(**job, push=REPO)
        assert hub.commits(REPO) == 2
        assert verify(f"hf://{REPO}") == []

    def test_a_commit_of_somebody_else(
        self, hub: StandinHub, job: dict[str, Any], world: Any, monkeypatch: Any
    ) -> None:
        """Between the claim and the commit: refused, and nothing of theirs is lost."""
        from safeshard.streamer.sources.stores import HubStore

        preupload = HubStore.preupload

        def meanwhile(self: HubStore, name: str, path: Path) -> Any:
            hub.writes._add(REPO, {"notes.txt": hub._stored(job["aligned"] / "config.json", lfs=False)})
            return preupload(self, name, path)

        monkeypatch.setattr(HubStore, "preupload", meanwhile)
        with pytest.raises(RunError, match=r"somebody else committed meanwhile"):
            safemerge(**job, push=REPO)
        assert set(hub.content(REPO)) == {"notes.txt"}

    @pytest.mark.parametrize(("kind", "status"), [("status", 503), ("reset", 0)])
    def test_passing_ones(self, hub: StandinHub, job: dict[str, Any], kind: str, status: int) -> None:
        fault = hub.fail(f"/api/models/{REPO}/commit", kind, status=status, times=2)
        safemerge(**job, push=REPO)
        assert fault.times == 0
        assert verify(f"hf://{REPO}") == []

    def test_what_is_finished_here_is_pushed_by_the_same_command(
        self, hub: StandinHub, job: dict[str, Any], world: Any
    ) -> None:
        hub.fail(f"/api/models/{REPO}/commit", status=403, times=1)
        with pytest.raises(RunError, match=r"out itself is finished .use credentials that may write there"):
            safemerge(**job, output=world.root / "out", push=REPO)
        assert verify(world.root / "out") == []
        assert "manifest.json" not in hub.content(REPO)
        safemerge(**job, output=world.root / "out", push=REPO)
        assert hub.content(REPO) == local(world.root / "out")
        safemerge(**job, output=world.root / "out", push=REPO)
        assert hub.commits(REPO) == 2

    def test_a_failed_push_goes_on_from_the_work_folder(self, hub: StandinHub, job: dict[str, Any], work: Path) -> None:
        hub.fail(f"/api/models/{REPO}/commit", status=403, times=1)
        with pytest.raises(RunError):
            safemerge(**job, push=REPO)
        assert hub.commits(REPO) == 1
        hub.taken()
        safemerge(**job, push=REPO)
        assert not [r for r in hub.taken() if r.path.startswith("/lfs/")]  # the Hub has them by their hashes
        assert verify(f"hf://{REPO}") == []
