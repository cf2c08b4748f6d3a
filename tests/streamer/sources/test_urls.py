"""Sources: URLs that fsspec opens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from small_checkpoint import one_line, read_weight, weight

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.inputs.checkpoint import open_checkpoint
from safeshard.streamer.sources import Source, open_source


class TestUrls:
    @pytest.fixture
    def memory(self, folder: Path) -> Iterator[Source]:
        files = fsspec.filesystem("memory")
        for path in folder.iterdir():
            files.pipe(f"/bucket/model/{path.name}", path.read_bytes())
        files.pipe("/bucket/model/sub/x", b"x")
        yield open_source("memory://bucket/model/")
        files.rm("/bucket", recursive=True)

    def test_memory(self, memory: Source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert memory.sizes() == {p.name: p.stat().st_size for p in folder.iterdir()}
        assert memory.local_path("config.json") is None
        assert memory.read("config.json", 3, 3) == b""
        monkeypatch.setattr("safeshard.streamer.sources.url.PIECE", 1000)
        checkpoint = open_checkpoint(memory)
        assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]

    def test_truncated_underway(self, memory: Source) -> None:
        fsspec.filesystem("memory").pipe("/bucket/model/config.json", b"{}")
        with pytest.raises(RunError, match=r"config\.json: .*nothing came of byte 2, 10 were expected"):
            memory.read("config.json", 0, 10)

    def test_gone_underway(self, memory: Source) -> None:
        fsspec.filesystem("memory").rm("/bucket/model/config.json")
        with pytest.raises(RunError, match=r"model/config\.json: FileNotFoundError"):
            memory.read("config.json", 0, 10)

    def test_only_listed_files(self, memory: Source) -> None:
        for name in ("../other", "sub/x", "absent"):
            with pytest.raises(RequestError, match="listed there, got no such file"):
                memory.read(name, 0, 1)

    def test_file_urls_are_folders(self, folder: Path) -> None:
        source = open_source(f"file://{folder}")
        assert (source.spec, source.identity) == (f"file://{folder}", open_source(folder).identity)
        assert source.local_path("config.json") == folder / "config.json"
        assert read_weight(open_checkpoint(source), 1) == weight(1)

    @pytest.mark.parametrize(("spec", "words"), [("memory://absent", "FileNotFound"), ("nonsense://x", "Protocol not")])
    def test_refused(self, spec: str, words: str) -> None:
        with pytest.raises(RequestError, match=words) as error:
            open_source(spec)
        one_line(error)

    def test_a_missing_driver_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("gcsfs", "obstore"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RequestError, match=r"safeshard\[buckets\]"):
            open_source("gs://bucket/model")
