"""Sources: folders, a loopback stub of the Hub that logs every request, and fsspec URLs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from safeshard.manifests.errors import RequestError, RunError
from safeshard.streamer.inputs.checkpoint import Checkpoint, open_checkpoint
from safeshard.streamer.sources import LocalSource, Source, open_source, read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards, one tensor each, with a config and a tokenizer."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for i, shard in enumerate(SHARDS):
        save_file({f"model.layers.{i}.up.weight": torch.full((30, 50), i + 1.0)}, folder / shard)
    weight_map = {f"model.layers.{i}.up.weight": shard for i, shard in enumerate(SHARDS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read_weight(checkpoint: Checkpoint, layer: int) -> bytes:
    ref = checkpoint.tensors[f"model.layers.{layer}.up.weight"]
    buffer = bytearray(ref.nbytes)
    checkpoint.source.readinto(ref.file, ref.offset, memoryview(buffer))
    return bytes(buffer)


def weight(layer: int) -> bytes:
    return torch.full((30, 50), layer + 1.0).numpy().tobytes()


def header_end(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


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


class StubHub:
    """The endpoints of the Hub that huggingface_hub calls to find and fetch files, on the loopback interface.

    Attributes:
        log: (method, file, Range header) of every request for a file, in order.
        tokens: the Authorization headers seen.
        denied: file -> (status, X-Error-Code) to answer with.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.denied: dict[str, tuple[int, str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(request, self.root / match[1], match[2] or "main")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:  # not about repositories
            return self._send(request, 404, b"", {})
        return self._file(request, self.root / match[1], match[2], match[3])

    def _info(self, request: BaseHTTPRequestHandler, repo: Path, revision: str) -> None:
        self.tokens.add(request.headers["Authorization"])
        if not repo.is_dir():
            return self._send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT):
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": p.name, "size": p.stat().st_size, "blobId": "0" * 40} for p in repo.iterdir()]
        info = {
            "id": "/".join(repo.parts[-2:]),
            "sha": COMMIT,
            "siblings": [*files, {"rfilename": "onnx/x", "size": 1}],
        }
        return self._send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, repo: Path, revision: str, name: str) -> None:
        self.tokens.add(request.headers["Authorization"])
        wanted = request.headers["Range"]
        self.log.append((request.command, name, wanted))
        if name in self.denied:
            status, code = self.denied[name]
            return self._send(request, status, b"", {"X-Error-Code": code})
        assert revision in ("main", "v1", COMMIT)
        data = (repo / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if wanted is None:
            return self._send(request, 200, data, headers)
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(request, 206, data[first : last + 1], headers)

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def got(self) -> list[str]:
        """Files fetched whole since the last call; the log is emptied."""
        files = [name for method, name, wanted in self.log if method == "GET" and wanted is None]
        self.log.clear()
        return files


def reload_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub read its environment again: it does so when first imported."""
    for module in [m for m in sys.modules if m.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """The stub with org/name, which holds what `folder` holds, and an empty cache."""
    (tmp_path / "hub" / "org").mkdir(parents=True)
    folder.rename(tmp_path / "hub" / "org" / "name")
    stub = StubHub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)
    reload_hub(monkeypatch)
    yield stub
    stub.close()


class TestHub:
    def test_a_plan_reads_headers_and_a_run_the_shards_it_needs(self, hub: StubHub, tmp_path: Path) -> None:
        repo = hub.root / "org" / "name"
        checkpoint = open_checkpoint(open_source("org/name"))
        ranges = [(name, wanted) for method, name, wanted in hub.log if method == "GET" and wanted]
        assert ranges == [
            each
            for shard in SHARDS
            for each in ((shard, "bytes=0-7"), (shard, f"bytes=8-{header_end(repo / shard) - 1}"))
        ]
        assert hub.got() == ["config.json", "model.safetensors.index.json"]
        source = checkpoint.source
        assert source.sizes() == {p.name: p.stat().st_size for p in repo.iterdir()}
        assert (source.revision, source.identity) == (COMMIT, f"hf://org/name@{COMMIT}")
        assert read_weight(checkpoint, 1) == weight(1)
        assert hub.got() == [SHARDS[1]]
        assert read_weight(checkpoint, 1) == weight(1)
        assert source.read(SHARDS[1], 0, 8) == (repo / SHARDS[1]).read_bytes()[:8]
        assert source.read("tokenizer.json", 0, 2) == b"{}"
        path = source.local_path(SHARDS[1])
        assert path is not None
        assert path.is_relative_to(tmp_path / "cache")
        assert hub.got() == ["tokenizer.json"]

    def test_a_pinned_name(self, hub: StubHub) -> None:
        for spec in ("hf://org/name", "hf://org/name@v1", f"org/name@{COMMIT}"):
            source = open_source(spec)
            assert (source.spec, source.revision) == (spec, COMMIT)
            assert source.identity == open_source("org/name").identity

    def test_a_folder_comes_before_the_hub(self, hub: StubHub, tmp_path: Path) -> None:
        (tmp_path / "org" / "name").mkdir(parents=True)
        assert open_source("org/name").sizes() == {}
        assert open_source("hf://org/name").sizes() != {}

    def test_one_download_of_a_shard_for_many_threads(self, hub: StubHub) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.got()
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda i: read_weight(checkpoint, i % 2), range(16)))
        assert results == [weight(i % 2) for i in range(16)]
        assert sorted(hub.got()) == SHARDS

    def test_only_listed_files(self, hub: StubHub) -> None:
        source = open_source("org/name")
        hub.log.clear()
        for name in ("../../x", "absent.safetensors", "onnx/x"):
            with pytest.raises(RequestError, match="listed there, got no such file"):
                source.read(name, 0, 8)
        assert hub.log == []

    def test_token(self, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        read_weight(open_checkpoint(open_source("org/name")), 0)
        assert hub.tokens == {"Bearer hf_secret"}

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("org/absent", "Repository Not Found"),
            ("hf://org/name@v2", "Revision Not Found"),
            ("hf://name", "another form"),
            ("hf://org/name/sub", "another form"),
            ("hf://org/name@../../x", "another form"),
            ("hf://", "another form"),
        ],
    )
    def test_refused_at_open(self, hub: StubHub, spec: str, words: str) -> None:
        with pytest.raises(RequestError, match=words) as error:
            open_source(spec)
        assert one_line(error).startswith(spec)

    def test_gated(self, hub: StubHub) -> None:
        hub.denied["config.json"] = (403, "GatedRepo")
        with pytest.raises(RequestError, match=r"(?i)gated.*HF_TOKEN") as error:
            open_source("org/name")
        one_line(error)

    def test_no_network(self, hub: StubHub) -> None:
        hub.close()
        with pytest.raises(RequestError, match=r"Connect.*network") as error:
            open_source("org/name")
        one_line(error)

    def test_failures_underway(self, hub: StubHub) -> None:
        checkpoint = open_checkpoint(open_source("org/name"))
        hub.denied[SHARDS[0]] = (403, "GatedRepo")
        with pytest.raises(RunError, match=f"{SHARDS[0]}: the download failed: .*403") as error:
            read_weight(checkpoint, 0)
        assert one_line(error).endswith("then run again)")
        with pytest.raises(RunError, match=f"{SHARDS[0]}: .*403"):
            checkpoint.source.read(SHARDS[0], 0, 8)
        assert read_weight(checkpoint, 1) == weight(1)

    def test_a_mirror_that_ignores_ranges(self, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_source("org/name")
        monkeypatch.setattr(hub, "_send", lambda r, status, *rest: StubHub._send(hub, r, 200, b"0" * 20, {}))
        with pytest.raises(RunError, match="has nothing at byte 20 of 8 expected"):
            source.read(SHARDS[0], 0, 8)


class TestOffline:
    @pytest.fixture
    def cached(self, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> StubHub:
        """The stub gone, its first shard and the small files in the cache."""
        read_weight(open_checkpoint(open_source("org/name")), 0)
        hub.close()
        hub.log.clear()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        reload_hub(monkeypatch)
        return hub

    @pytest.mark.parametrize("spec", ["org/name", f"hf://org/name@{COMMIT}"])
    def test_reads_the_cache(self, cached: StubHub, spec: str) -> None:
        source = open_source(spec)
        assert (source.spec, source.revision) == (spec, COMMIT)
        expected = (cached.root / "org" / "name" / SHARDS[0]).read_bytes()
        assert source.read(SHARDS[0], 0, len(expected)) == expected

    def test_a_shard_that_is_missing_is_named(self, cached: StubHub) -> None:
        with pytest.raises(RequestError, match=f"{SHARDS[1]}: .*no such file") as error:
            open_checkpoint(open_source("org/name"))
        assert one_line(error).startswith("org/name/")

    @pytest.mark.parametrize("spec", ["org/other", "hf://org/name@v1"])
    def test_what_is_not_cached(self, cached: StubHub, spec: str) -> None:
        with pytest.raises(RequestError, match="HF_HUB_OFFLINE is set") as error:
            open_source(spec)
        one_line(error)


def test_commands_take_hub_names(hub: StubHub, world: Any, tmp_path: Path) -> None:
    """Whole runs in processes of their own, online and then from the cache: same bytes as from folders."""
    trio = world.trio(shards=2)
    for role, path in trio.items():
        path.rename(hub.root / "org" / role)

    def run(output: str, place: str, status: int = 0, **environment: str) -> str:
        roles = [part for role in trio for part in (f"--{role.replace('_', '-')}", f"{place}/{role}")]
        command = [sys.executable, "-m", "safeshard", "safemerge", *roles, "--output", output]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    run("online", "hf://org")
    checkpoint = ["config.json", "model.safetensors.index.json", *SHARDS]
    assert sorted(hub.got()) == sorted(2 * [*checkpoint, "adapter_config.json", "adapter_model.safetensors"])
    hub.denied[SHARDS[1]] = (403, "GatedRepo")
    assert SHARDS[1] in run("denied", "hf://org", status=2, HF_HOME=str(tmp_path / "empty"))
    hub.close()
    assert "Connect" in run("down", "hf://org", status=2)
    run("offline", "hf://org", HF_HUB_OFFLINE="1")
    run("local", str(hub.root / "org"))
    outputs = [Path(name, "adapter_model.safetensors").read_bytes() for name in ("online", "offline", "local")]
    assert outputs[0] == outputs[1] == outputs[2]
    assert not list(tmp_path.glob("down*"))


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
        monkeypatch.setattr("safeshard.streamer.sources.url.RANGE_BYTES", 1000)
        checkpoint = open_checkpoint(memory)
        assert [read_weight(checkpoint, i) for i in (0, 1)] == [weight(0), weight(1)]

    def test_truncated_underway(self, memory: Source) -> None:
        fsspec.filesystem("memory").pipe("/bucket/model/config.json", b"{}")
        with pytest.raises(RunError, match=r"config\.json has nothing at byte 2 of 10 expected"):
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
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(RequestError, match=r"safeshard\[hub-s3\]"):
            open_source("s3://bucket/model")


def test_a_source_that_was_never_opened_is_dropped_in_silence() -> None:
    """As where a signal ends its constructor."""
    LocalSource.__new__(LocalSource).__del__()
