"""Folders on web servers as sources; and secrets in URLs, which come into no file and no message."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import SHARDS, one_line, read_weight, weight
from stand_in_hub import StandinHub

from safeshard.manifests.errors import Offence, RunError, SafeshardError, printable, without_secrets
from safeshard.manifests.schema import load
from safeshard.streamer import batch, inspect, report, safemerge, score, verify
from safeshard.streamer.cli import app
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import open_source

SECRETS = ("pa55word", "s1gnature", "alice")


class TestWeb:
    def test_reads_ranges(self, hub: StandinHub, folder: Path) -> None:
        source = open_source(hub.web(folder) + "/")
        assert source.sizes() == {p.name: p.stat().st_size for p in folder.iterdir()}
        checkpoint = open_checkpoint(source)
        hub.taken()
        assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]
        assert [r.sent for r in hub.taken()] == [6000, 6000]
        assert source.changed() == set()

    def test_what_is_replaced_underway(self, hub: StandinHub, folder: Path) -> None:
        checkpoint = open_checkpoint(open_source(hub.web(folder)))
        data = bytearray((folder / SHARDS[0]).read_bytes())
        data[-1] ^= 1
        (folder / SHARDS[0]).write_bytes(data)
        assert checkpoint.source.changed() == {SHARDS[0]}
        with pytest.raises(RunError, match=f"{SHARDS[0]}: .*once the file is at rest"):
            read_weight(checkpoint, 0)

    @pytest.mark.parametrize(("kind", "words"), [("ignore_range", "ignores byte ranges"), ("html", "byte ranges")])
    def test_servers_that_serve_no_ranges(self, hub: StandinHub, folder: Path, kind: str, words: str) -> None:
        place = hub.web(folder)
        hub.fail("/web/", kind)
        with pytest.raises(SafeshardError, match=words) as error:
            open_source(place)
        one_line(error)

    def test_passing_faults(self, hub: StandinHub, folder: Path) -> None:
        place = hub.web(folder)
        hub.fail("/web/", status=503, times=4)
        assert open_source(place).sizes().keys() == {p.name for p in folder.iterdir()}

    def test_nothing_there(self, hub: StandinHub, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(SafeshardError, match="name the folder that holds the model's files"):
            open_source(hub.web(tmp_path / "empty"))


class TestSecrets:
    @pytest.fixture
    def places(self, hub: StandinHub, world: Any) -> dict[str, str]:
        trio = world.trio(shards=2)
        return {role: self.secret(hub.web(path)) for role, path in trio.items()}

    def secret(self, url: str) -> str:
        return url.replace("http://", "http://alice:pa55word@") + "?X-Sig=s1gnature"

    def check(self, *texts: str) -> None:
        for text in texts:
            for secret in SECRETS:
                assert secret not in text

    def test_none_in_an_output(
        self,
        places: dict[str, str],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with caplog.at_level(logging.DEBUG):
            result = safemerge(**places, output=tmp_path / "out")
        score(**{k: v for k, v in places.items() if k != "safe_adapter"}, output=tmp_path / "scores.csv")
        report(tmp_path / "out", file=tmp_path / "page.html")
        assert verify(tmp_path / "out", inputs=True, recompute=1, sources=places) == []
        files = [*(tmp_path / "out").iterdir(), tmp_path / "scores.csv", tmp_path / "page.html"]
        assert len(files) > 5
        for path in files:
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path.name
        ours = [r.getMessage() for r in caplog.records if not r.name.startswith("httpcore")]
        self.check(*capsys.readouterr(), *ours, repr(result.plan.inputs["aligned"].source.spec))
        self.check(inspect(tmp_path / "out"))
        given = load(tmp_path / "out").inputs["aligned"]
        assert given.source == without_secrets(places["aligned"])
        assert given.source.startswith("http://127.0.0.1:")

    @pytest.mark.parametrize("fault", [{"status": 404}, {"status": 403}, {"kind": "html"}, {"kind": "ignore_range"}])
    @pytest.mark.parametrize("more", [[], ["--json"], ["--dry-run", "--json"]])
    def test_none_in_a_refusal(
        self, places: dict[str, str], hub: StandinHub, capsys: pytest.CaptureFixture[str], fault: dict[str, Any],
        more: list[str],
    ) -> None:  # fmt: skip
        hub.fail("/web/", **fault)
        words = [w for role, place in places.items() for w in (f"--{role.replace('_', '-')}", place)]
        with pytest.raises(SystemExit) as ended:
            app.main(["safemerge", *words, "--output", "out", *more])
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert "127.0.0.1" in said.out + said.err
        self.check(said.out, said.err)

    def test_none_in_a_jobs_file_s_refusals(self, hub: StandinHub, places: dict[str, str], tmp_path: Path) -> None:
        job = {"method": "safemerge", **places, "output": "o", "threshold": "high", "aligned": places["aligned"]}
        (tmp_path / "jobs.yaml").write_text(json.dumps({"jobs": [job, job | {"threshold": 0.3, "adaptor": "x"}]}))
        with pytest.raises(SafeshardError) as error:
            batch(tmp_path / "jobs.yaml")
        self.check(str(error.value))

    def test_a_dry_run_and_its_json(
        self, places: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        words = [w for role, place in places.items() for w in (f"--{role.replace('_', '-')}", place)]
        scored = [w for role, place in places.items() if role != "safe_adapter" for w in (f"--{role}", place)]
        dry = ["safemerge", *words, "--output", str(tmp_path / "out"), "--json", "--dry-run"]
        for command in (dry, ["score", *scored, "--json"]):
            with pytest.raises(SystemExit) as ended:
                app.main(command)
            assert ended.value.code in (0, None)
        self.check(*capsys.readouterr())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/a?x=1", "s3://bucket/a"), ("https://h/a#f", "https://h/a"),
        ("at https://u:p@ss@h:1/x?y, and s3://a@b/c", "at https://h:1/x and s3://b/c"),
        ("hf://org/name@main/sub", "hf://org/name@main/sub"), ("file:///a#b?c", "file:///a#b?c"),
        ("a@b", "a@b"), ("what? no://", "what? no://"), ("HTTPS://U:P@H/", "HTTPS://H/"),
        ("https:/u:p@h/x?y", "https:/h/x"), ("s3:/k:s@b/x", "s3:/b/x"), ("C:/a@b?c", "C:/a@b?c"), ("file:/a@b?c",) * 2,
    ],
)  # fmt: skip
def test_what_is_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert printable(text) == shown
    assert shown in str(Offence("x", got=text))
