"""The Hub as a source: what is asked for, and in which order; names, subfolders, tokens, refusals."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import SHARDS, header_end, one_line, read_weight, weight, write_checkpoint
from stand_in_hub import StandinHub

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import ShardCache, open_source, pinned


def ranges(hub: StandinHub) -> list[tuple[str, str | None]]:
    """The answers with content since the last call."""
    return sorted((r.name, r.range) for r in hub.taken() if r.status in (200, 206) and r.name)


def _full(**_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestReading:
    def test_a_plan_reads_headers_and_a_run_the_bytes_it_needs(self, hub: StandinHub, folder: Path) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        small = ["config.json", "model.safetensors.index.json"]
        ends = {shard: header_end(folder / shard) for shard in SHARDS}
        heads = [(s, r) for s in SHARDS for r in ("bytes=0-7", f"bytes=8-{ends[s] - 1}")]
        assert ranges(hub) == sorted([*((n, f"bytes=0-{(folder / n).stat().st_size - 1}") for n in small), *heads])
        assert checkpoint.source.sizes() == {p.name: p.stat().st_size for p in folder.iterdir()}
        assert read_weight(checkpoint, 1) == weight(1)
        assert ranges(hub) == [(SHARDS[1], f"bytes={ends[SHARDS[1]]}-{ends[SHARDS[1]] + 5999}")]

    def test_headers_are_kept_from_the_dry_run_to_the_run(self, hub: StandinHub, tmp_path: Path) -> None:
        first = open_checkpoint(open_source("org/name"))
        hub.taken()
        assert open_checkpoint(open_source("org/name")).tensors == first.tensors
        assert not [name for name, _ in ranges(hub) if name in SHARDS]
        for kept in (tmp_path / "xdg" / "safeshard" / "headers").iterdir():  # damage is noticed
            kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
        assert open_checkpoint(open_source("org/name")).tensors == first.tensors
        assert len([name for name, _ in ranges(hub) if name in SHARDS]) == 4

    def test_headers_come_side_by_side(self, hub: StandinHub) -> None:
        source = open_source("org/name")
        hub.delay, hub.peak = 0.1, 0
        open_checkpoint(source)
        assert hub.peak == len(SHARDS)

    def test_a_large_tensor_comes_in_pieces(self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("safeshard.streamer.sources.http.PIECE", 1000)
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.taken()
        assert read_weight(checkpoint, 0) == weight(0)
        taken = [r for r in hub.taken() if r.status == 206]
        assert [r.sent for r in taken] == [1000] * 6
        assert len({r.range for r in taken}) == 6

    def test_signed_urls_serve_many_reads(self, hub: StandinHub) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.taken()
        for _ in range(5):
            assert read_weight(checkpoint, 0) == weight(0)
        assert Counter(r.status for r in hub.taken()) == {206: 5}

    def test_a_signed_url_that_has_run_out_is_renewed(self, hub: StandinHub) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.taken()
        hub.signed = dict.fromkeys(hub.signed, 0.0)
        assert read_weight(checkpoint, 0) == weight(0)
        assert [r.status for r in hub.taken()] == [403, 302, 206]

    def test_an_adapter_comes_whole_and_once(self, hub: StandinHub, world: Any) -> None:
        folder = world.adapter("adapter", world.llama())
        hub.add("org/adapter", folder)
        source, name = open_source("org/adapter"), "adapter_model.safetensors"
        data = (folder / name).read_bytes()
        hub.taken()
        assert source.read(name, 0, 8) == data[:8]  # for a plan, its header alone
        assert ranges(hub) == [(name, "bytes=0-7")]
        buffer = bytearray(100)
        for start in (300, 500):
            source.readinto(name, start, memoryview(buffer))
            assert bytes(buffer) == data[start : start + 100]
        assert source.read(name, 0, 8) == data[:8]
        assert ranges(hub) == [(name, f"bytes=0-{len(data) - 1}")]
        assert source.checked(name) == "hash"

    def test_an_adapter_whose_header_came_damaged(self, hub: StandinHub, world: Any) -> None:
        """Its content is sound, but where the tensors lie was told wrong."""
        hub.add("org/adapter", world.adapter("adapter", world.llama()))
        source, name = open_source("org/adapter"), "adapter_model.safetensors"
        hub.fail("/cdn/", "flip", after=5, times=1)
        source.read(name, 0, 8)
        with pytest.raises(RunError, match=r"the header of org/adapter/.*not what the Hub states"):
            source.readinto(name, 300, memoryview(bytearray(10)))

    def test_no_room_for_an_adapter(self, hub: StandinHub, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add("org/adapter", world.adapter("adapter", world.llama()))
        source = open_source("org/adapter")
        monkeypatch.setattr("safeshard.streamer.sources.hub.held.IN_MEMORY", 0)
        monkeypatch.setattr("tempfile.TemporaryFile", _full)
        with pytest.raises(RunError, match=r"cannot be held in .*set TMPDIR"):
            source.readinto("adapter_model.safetensors", 300, memoryview(bytearray(10)))

    def test_the_session_of_older_releases(self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before 1.0 huggingface_hub went through requests."""
        session = pytest.importorskip("requests").Session()
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
        hub.fail("/cdn/", "truncate", after=3, times=3)
        hub.fail("/cdn/", status=503, times=2)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        checkpoint = open_checkpoint(open_source("org/name"))
        assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]
        assert {r.token for r in hub.taken() if r.path.startswith("/cdn/")} == {None}

    def test_many_threads(self, hub: StandinHub) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda i: read_weight(checkpoint, i % 2), range(16)))
        assert results == [weight(i % 2) for i in range(16)]

    def test_only_listed_files(self, hub: StandinHub, folder: Path) -> None:
        source = open_source("org/name")
        hub.taken()
        for name in ("../../x", "absent.safetensors", "onnx/x"):
            with pytest.raises(RequestError, match="listed there, got no such file"):
                source.read(name, 0, 8)
        assert hub.taken() == []

    def test_a_moved_branch_changes_nothing_of_what_was_opened(self, hub: StandinHub, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        other = write_checkpoint(tmp_path / "other")
        (other / "config.json").write_text('{"model_type": "qwen2"}')
        moved = hub.add("org/name", other)
        assert read_weight(checkpoint, 0) == weight(0)
        assert checkpoint.source.changed() == set()
        assert open_source("org/name").revision == moved != checkpoint.source.revision


class TestNames:
    def test_pinned(self, hub: StandinHub, folder: Path) -> None:
        commit = hub.add("org/name", folder, "v1")
        for spec in ("hf://org/name", "hf://org/name@v1", f"org/name@{commit}"):
            source = open_source(spec)
            assert (source.spec, source.revision) == (spec, commit)
            assert source.identity == open_source("org/name").identity
            assert pinned(spec, commit) == f"hf://org/name@{commit}"

    @pytest.mark.parametrize(
        "spec",
        ["org/name/deep/one", "hf://org/name/deep/one", "hf://org/name@main/deep/one", "hf://org/name@main/deep/one/"],
    )
    def test_a_folder_of_a_repository(self, hub: StandinHub, tmp_path: Path, spec: str) -> None:
        write_checkpoint(tmp_path / "repo" / "deep" / "one")
        (tmp_path / "repo" / "deep" / "one" / "more").mkdir()
        (tmp_path / "repo" / "deep" / "one" / "more" / "x.json").write_text("{}")
        commit = hub.add("org/name", tmp_path / "repo")
        source = open_source(spec)
        assert source.sizes().keys() == {p.name for p in (tmp_path / "checkpoint").iterdir()}
        assert read_weight(open_checkpoint(source), 1) == weight(1)
        assert source.identity == pinned(spec, commit) == f"hf://org/name@{commit}/deep/one"
        assert open_source(source.identity).sizes() == source.sizes()

    def test_a_folder_that_is_not_there_names_those_that_are(self, hub: StandinHub, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "repo" / "checkpoint-10")
        hub.add("org/name", tmp_path / "repo")
        with pytest.raises(RequestError, match=r"folders with weights: checkpoint-10"):
            open_source("org/name/checkpoint-11")

    def test_a_branch_with_a_slash(self, hub: StandinHub, folder: Path, tmp_path: Path) -> None:
        hub.add("org/name", write_checkpoint(tmp_path / "other" / "sub").parent, "feature/x")
        hub.add("org/name", folder, "refs/pr/7")
        assert "config.json" in open_source("hf://org/name@feature/x/sub").sizes()
        assert "config.json" in open_source("hf://org/name@refs/pr/7").sizes()

    def test_a_folder_comes_before_the_hub(self, hub: StandinHub, tmp_path: Path) -> None:
        (tmp_path / "org" / "name").mkdir(parents=True)
        assert open_source("org/name").sizes() == {}
        assert open_source("hf://org/name").sizes() != {}


class TestRefusals:
    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("org/absent", "Repository Not Found.*private"),
            ("hf://org/name@v2", "Revision Not Found.*branch"),
            ("hf://org/name@main/sub", "nothing there"),
            ("hf://name", "another form"),
            ("hf://org/name@../../x", "another form"),
            ("hf://", "another form"),
        ],
    )
    def test_refused_at_open(self, hub: StandinHub, spec: str, words: str) -> None:
        with pytest.raises(RequestError, match=words) as error:
            open_source(spec)
        assert one_line(error).startswith(spec)

    def test_token(self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch) -> None:
        """It goes to the Hub, and not to where the Hub redirects."""
        hub.private = "hf_secret"
        with pytest.raises(RequestError, match="log in") as error:
            open_source("org/name")
        one_line(error)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.taken()
        assert read_weight(open_checkpoint(open_source("org/name")), 0) == weight(0)
        tokens = {r.path.startswith("/cdn/"): r.token for r in hub.taken()}
        assert tokens == {True: None, False: "Bearer hf_secret"}

    def test_gated(self, hub: StandinHub) -> None:
        hub.fail("/resolve/", status=403, headers={"X-Error-Code": "GatedRepo"})
        with pytest.raises(RequestError, match=r"accept the terms on https://\S+/org/name, and log in") as error:
            open_source("org/name")
        one_line(error)

    def test_gone_underway(self, hub: StandinHub) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.signed.clear()
        hub.fail(f"/resolve/.*{SHARDS[0]}", status=403, headers={"X-Error-Code": "GatedRepo"})
        with pytest.raises(RunError, match=f"{SHARDS[0]}: .*403.*GatedRepo.*accept the terms") as error:
            read_weight(checkpoint, 0)
        one_line(error)
        assert read_weight(checkpoint, 1) == weight(1)

    def test_no_network(self, hub: StandinHub) -> None:
        hub.close()
        with pytest.raises(RequestError, match=r"Connect.*check the network") as error:
            open_source("org/name")
        assert "HF_HUB_OFFLINE" not in one_line(error)

    @pytest.mark.parametrize("spec", ["org/name", "hf://org/name"])
    def test_a_name_without_address(
        self, hub: StandinHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spec: str
    ) -> None:
        """What a machine without network answers, or a typo in HF_ENDPOINT: not asked for long."""

        def unresolved(*_: object, **__: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unresolved)
        with pytest.raises(RequestError, match="Name or service not known") as error:
            open_source(spec)
        assert caplog.text.count("another try") == 1
        assert ("no folder of this name here" in one_line(error)) == (spec == "org/name")
        assert "check the network" in one_line(error)

    def test_no_network_but_a_copy(self, hub: StandinHub) -> None:
        commit = open_source("org/name", ShardCache(fetches=True)).revision
        hub.close()
        with pytest.raises(RequestError, match=f"HF_HUB_OFFLINE=1 .* cache holds of commit {str(commit)[:12]}"):
            open_source("org/name")
