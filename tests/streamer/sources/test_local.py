"""Sources: local folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_checkpoint import SHARDS, one_line, read_weight, weight

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import LocalSource, open_source, read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TestFolder:
    def test_lists_and_reads(self, folder: Path) -> None:
        (folder / "subfolder").mkdir()
        source = open_source(folder)
        assert source.sizes() == {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
        assert source.read("config.json", 2, 12) == b"model_type"[:10]
        assert source.read("config.json", 5, 5) == b""
        assert source.local_path("config.json") == folder / "config.json"
        assert source.identity == open_source(f"{folder}/../checkpoint").identity
        assert [read_weight(open_checkpoint(source), i) for i in (0, 1)] == [weight(0), weight(1)]

    def test_a_missing_folder_beside_others_is_not_looked_for_on_the_hub(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder.parent)
        (folder.parent / "my" / "models").mkdir(parents=True)
        with pytest.raises(RequestError, match=r"no such folder in my/models .*hf://my/models/alice"):
            open_source("my/models/alice")

    @pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "sub/inside", "..", ".", "", "absent"])
    def test_reads_listed_names_alone(self, folder: Path, name: str) -> None:
        (folder.parent / "outside").write_text("secret")
        (folder / "sub").mkdir()
        (folder / "sub" / "inside").write_text("x")
        source = open_source(folder)
        for use in (lambda: source.read(name, 0, 1), lambda: source.local_path(name)):
            with pytest.raises(RequestError, match="inside the folder"):
                use()

    @pytest.mark.parametrize("target", ["../outside", "/etc/passwd"])
    def test_refuses_links_that_leave(self, folder: Path, target: str) -> None:
        (folder.parent / "outside").write_text("secret")
        (folder / "linked").symlink_to(target)
        (folder / "within").symlink_to("config.json")
        source = open_source(folder)
        assert source.read("within", 2, 7) == b"model"
        with pytest.raises(RequestError, match=r"linked.*inside the folder"):
            source.read("linked", 0, 1)

    def test_follows_the_links_of_the_hubs_cache(self, tmp_path: Path) -> None:
        repo = tmp_path / "models--org--name"
        snapshot = repo / "snapshots" / COMMIT
        for place in (snapshot, repo / "blobs", tmp_path / "blobs" / "ab"):
            place.mkdir(parents=True)
        (repo / "blobs" / "1").write_text("one")
        (tmp_path / "blobs" / "ab" / "2").write_text("two")  # a blob that repositories share
        (repo / "blobs" / "2").symlink_to("../../blobs/ab/2")
        (repo / "refs").write_text("no blob")
        for name in "12":
            (snapshot / name).symlink_to(f"../../blobs/{name}")
        (snapshot / "3").symlink_to("../../refs")
        source = open_source(snapshot)
        assert [source.read(name, 0, 3) for name in "12"] == [b"one", b"two"]
        with pytest.raises(RequestError, match="inside the folder"):
            source.read("3", 0, 1)

    def test_opens_regular_files_alone(self, folder: Path) -> None:
        (folder / "directory.safetensors").mkdir()
        (folder / "device").symlink_to("/dev/zero")
        (folder / "broken").symlink_to("absent")
        os.mkfifo(folder / "pipe.safetensors")
        source = open_source(folder)
        for name in ("directory.safetensors", "device", "broken", "pipe.safetensors"):
            assert name not in source.sizes()
            with pytest.raises(RequestError):
                source.read(name, 0, 1)

    def test_a_file_that_gives_way_to_a_pipe_does_not_block(self, folder: Path) -> None:
        source = open_source(folder)
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
        with pytest.raises(RunError, match=r"config\.json is gone"):
            source.read("config.json", 0, 1)

    def test_truncated_underway(self, folder: Path) -> None:
        checkpoint = open_checkpoint(open_source(folder))
        with (folder / SHARDS[0]).open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(RunError, match=rf"{SHARDS[0]} has nothing at byte 1000 of \d+ expected") as error:
            read_weight(checkpoint, 0)
        one_line(error)

    def test_short_reads_are_continued(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint, preadv = open_checkpoint(open_source(folder)), os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
        assert read_weight(checkpoint, 1) == weight(1)

    @pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
    def test_errors_of_the_disk_name_the_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        checkpoint = open_checkpoint(open_source(folder))

        def fail(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(RunError, match=f"{SHARDS[0]}: reading failed: .*{os.strerror(code)}"):
            read_weight(checkpoint, 0)

    def test_unreadable_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(*_: object) -> int:  # permissions do not stop root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "open", deny)
        with pytest.raises(RunError, match=r"config\.json: reading failed: .*Permission denied"):
            open_source(folder).read("config.json", 0, 1)

    def test_unlistable_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(*_: object) -> Iterator[Path]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "iterdir", deny)
        with pytest.raises(RequestError, match="can be listed, got PermissionError: Permission denied"):
            open_source(folder)

    @pytest.mark.parametrize("spec", ["", "a\0b", "x" * 5000, "/absent", "./absent", "../absent/one", "file:///absent"])
    def test_no_such_folder(self, spec: str) -> None:
        with pytest.raises(RequestError) as error:
            open_source(spec)
        one_line(error)

    def test_a_file_is_no_folder(self, folder: Path) -> None:
        with pytest.raises(RequestError, match="got a file"):
            open_source(folder / "config.json")

    def test_empty_folder(self, tmp_path: Path) -> None:
        source = open_source(tmp_path)
        assert source.sizes() == {}
        with pytest.raises(RequestError, match="no safetensors file"):
            open_checkpoint(source)

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"])
    def test_json_that_does_not_parse(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(RequestError, match=r"config\.json: expected valid JSON"):
            read_json(open_source(folder), "config.json")


def test_a_source_that_was_never_opened_is_dropped_in_silence() -> None:
    """As where a signal ends its constructor."""
    LocalSource.__new__(LocalSource).__del__()
