"""A stand-in for the Hugging Face Hub on the loopback interface: what huggingface_hub and hf-xet ask of it, and faults.

It answers as the Hub does: large files by a redirect to signed URLs of another host name, with the commit, the size and
the sha256 in the headers; small ones at once. Every request is kept, with the bytes that its answer held.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_writes import HubWrites


@dataclass(frozen=True)
class Stored:
    """A file of a commit."""

    path: Path
    size: int
    sha256: str
    blob_id: str
    lfs: bool


@dataclass
class Request:
    """A request and what was sent in answer to it."""

    method: str
    path: str  # without the query
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0  # bytes of the body

    @property
    def name(self) -> str:
        """The file that was asked for, "" where it was not about a file."""
        match = re.fullmatch(r"/(?:[^/]+/[^/]+/resolve/[^/]+|cdn/[^/]+)/(.+)", self.path)
        return match[1] if match else ""


@dataclass
class Fault:
    """What goes wrong with requests whose path (and host role, "hub" or "cdn") matches, `times` times.

    kinds: status; reset (the connection, after `after` bytes of the body); truncate (the body ends there, as if it
    were whole); slow (`after` bytes, then one a second); stall (`after` bytes, then nothing);
    ignore_range (200 and everything); flip (one bit of the body's byte `after`); html (a login page with status 200);
    shorter (a 206 of half the range); elsewhere (a 206 of another range); hangup (nothing is done, nor answered).
    Of what writes: lost (it is done, and the connection ends without an answer); `then` is called once it is.
    """

    match: str
    kind: str = "status"
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1 << 30
    after: int = 0
    body: bytes = b""
    then: Callable[[], object] = lambda: None


class _Mute:
    """A handler whose answer goes nowhere."""

    def __init__(self, handler: Any) -> None:
        self.command, self.wfile = handler.command, io.BytesIO()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class StandinHub:
    """Repositories made of folders; `url` is what HF_ENDPOINT is set to."""

    def __init__(self, private: str | None = None, xet: Mapping[str, str] | None = None) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.striking: Callable[[Request], Fault | None] = lambda request: None  # of all requests, before these
        self.private = private  # the token that every repository wants
        self.signed: dict[str, float] = {}  # signature -> when it expires
        self.lifetime = 3600.0  # of signed URLs, seconds
        self.delay = 0.0  # of every answer, seconds
        self.peak = self._under_way = 0  # requests that waited for their answer at the same time
        self.busy = 0  # requests that are being answered
        self.xet: dict[str, str] = dict(xet or {})  # sha256 -> hash in the content-addressed store
        self.xet_store = ""
        self._folders: list[Path] = []
        self._commits: dict[str, dict[str, dict[str, Stored]]] = {}
        self._branches: dict[tuple[str, str], str] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._objects = tempfile.TemporaryDirectory()
        self.writes = HubWrites(self, Path(self._objects.name))
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:  # clients that hang up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}/cdn"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Commit a folder, subfolders and all, to a branch; earlier commits stay. Returns the commit."""
        files: dict[str, Stored] = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            files[name] = self._stored(path, lfs=name.endswith(".safetensors"))
        commit = hashlib.sha1(repr([(n, f.sha256) for n, f in files.items()]).encode()).hexdigest()
        self._commits.setdefault(repo, {})[commit] = files
        self._branches[repo, branch] = commit
        return commit

    def _stored(self, path: Path, lfs: bool) -> Stored:
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Stored(path, len(data), hashlib.sha256(data).hexdigest(), blob, lfs)

    def content(self, repo: str) -> dict[str, bytes]:
        """The files at the head of a repository."""
        return {name: f.path.read_bytes() for name, f in self._commits[repo][self._branches[repo, "main"]].items()}

    def commits(self, repo: str) -> int:
        """How many commits a repository has, the first and empty one included."""
        return len(self._commits.get(repo, {}))

    def web(self, folder: Path) -> str:
        """Serve a folder as a plain web server does; returns its URL."""
        self._folders.append(folder)
        return f"{self.url}/web/{len(self._folders) - 1}"

    def fail(self, match: str, kind: str = "status", **details: Any) -> Fault:
        """Let requests whose path matches the pattern go wrong; returns the fault, whose `times` counts down."""
        fault = Fault(match, kind, **details)
        self.faults.append(fault)
        return fault

    def close(self) -> None:
        """Stop answering; slow answers under way end."""
        self._stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self._objects.cleanup()

    def taken(self) -> list[Request]:
        """The requests since the last call."""
        with self._lock:
            requests, self.requests = self.requests, []
        return requests

    # what follows runs in the server's threads

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self._stopping.is_set():  # connections that were kept open
            handler.close_connection = True
            return
        with self._lock:
            self._under_way += 1
            self.peak = max(self.peak, self._under_way)
        time.sleep(self.delay)
        with self._lock:  # before it is answered: what the client asks next is not at the same time
            self._under_way -= 1
            self.busy += 1
        try:
            self._route(handler)
        finally:
            with self._lock:
                self.busy -= 1

    def _route(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        path, query = unquote(url.path), parse_qs(url.query)
        request = Request(handler.command, path, handler.headers["Range"], handler.headers["Authorization"])
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.match, path)), None)
            if fault is not None:
                fault.times -= 1
        fault = self.striking(request) or fault
        if fault is not None and fault.kind == "hangup":
            handler.close_connection = True
            return None
        if fault is not None and fault.kind == "status":
            handler.close_connection = True  # what was sent is not read
            return self._send(handler, request, fault.status, fault.body, fault.headers)
        if handler.command in ("POST", "PUT"):
            return self._written(handler, request, fault)
        if path == "/api/models":
            names = [repo for repo in self._commits if repo.startswith(f"{query.get('author', [''])[0]}/")]
            return self._json(handler, request, [{"id": name, "modelId": name} for name in names])
        if fault is not None and fault.kind == "html":
            page = b"<html>log in to this network first</html>"
            return self._send(handler, request, 200, page, {"Content-Type": "text/html"})
        if match := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            return self._cdn(handler, request, match[1], query.get("Signature", [""])[0], fault)
        if match := re.fullmatch(r"/web/(\d+)/([^/]+)", path):
            file = self._folders[int(match[1])] / match[2]
            if not file.is_file():
                return self._send(handler, request, 404, b"", {})
            mark = hashlib.sha1(file.read_bytes()).hexdigest()
            if handler.headers["If-Match"] not in (None, f'"{mark}"'):
                return self._send(handler, request, 412, b"", {})
            stored = Stored(file, file.stat().st_size, "", mark, False)
            return self._file(handler, request, stored, {"ETag": f'"{mark}"'}, fault)
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/models/([^/]+/[^/]+)/xet-read-token/(.+)", self._xet_token),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for pattern, route in reversed(routes):
            if match := re.fullmatch(pattern, path):
                files = self._find(handler, request, match[1], match[2] or "main")
                return None if files is None else route(handler, request, files, fault, *match.groups())
        return self._send(handler, request, 404, b"", {})

    def _written(self, handler: BaseHTTPRequestHandler, request: Request, fault: Fault | None) -> None:
        length = int(handler.headers["Content-Length"] or 0)
        body = handler.rfile.read(length)
        if handler.headers["Transfer-Encoding"] == "chunked":
            while size := int(handler.rfile.readline(), 16):
                body += handler.rfile.read(size)
                handler.rfile.readline()
            handler.rfile.readline()
        if fault is not None and fault.kind == "lost":
            self.writes.answer(_Mute(handler), request, body)
            fault.then()
        if fault is not None:
            handler.close_connection = True
            return
        self.writes.answer(handler, request, body)

    def _find(
        self, handler: BaseHTTPRequestHandler, request: Request, repo: str, revision: str
    ) -> tuple[str, dict[str, Stored]] | None:
        commits = self._commits.get(repo)
        commit = self._branches.get((repo, revision), revision)
        if self.private is not None and request.token != f"Bearer {self.private}":
            self._send(handler, request, 401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif commits is None:
            self._send(handler, request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif commit not in commits:
            self._send(handler, request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit, commits[commit]
        return None

    def _info(self, handler: Any, request: Request, found: Any, _: object, repo: str, revision: str | None) -> None:
        commit, files = found
        siblings = [
            {"rfilename": name, "size": f.size, "blobId": f.blob_id}
            | ({"lfs": {"sha256": f.sha256, "size": f.size, "pointerSize": 134}} if f.lfs else {})
            for name, f in files.items()
        ]
        body = {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": self.writes.private.get(repo, False),
            "tags": [],
            "siblings": siblings,
        }
        self._json(handler, request, body)

    def _tree(
        self, handler: Any, request: Request, found: Any, _: object, repo: str, revision: str, under: str | None
    ) -> None:
        entries = [
            {"type": "file", "oid": f.blob_id, "size": f.size, "path": name}
            | ({"lfs": {"oid": f.sha256, "size": f.size, "pointerSize": 134}} if f.lfs else {})
            | ({"xetHash": self.xet[f.sha256]} if f.sha256 in self.xet else {})
            for name, f in found[1].items()
            if not under or name.startswith(f"{under.rstrip('/')}/")
        ]
        self._json(handler, request, entries)

    def _xet_token(self, handler: Any, request: Request, *_: object) -> None:
        headers = {
            "X-Xet-Cas-Url": self.xet_store,
            "X-Xet-Access-Token": "short-lived",
            "X-Xet-Token-Expiration": str(int(time.time()) + 600),
        }
        self._send(handler, request, 200, b"{}", headers)

    def _resolve(
        self, handler: Any, request: Request, found: Any, fault: Fault | None, repo: str, _: str, name: str
    ) -> None:
        commit, files = found
        file = files.get(name)
        if file is None:
            return self._send(handler, request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if not file.lfs:
            return self._file(handler, request, file, headers | {"ETag": f'"{file.blob_id}"'}, fault)
        signature = f"{len(self.signed)}-secret"
        self.signed[signature] = time.monotonic() + self.lifetime
        headers |= {
            "X-Linked-Size": str(file.size),
            "X-Linked-ETag": f'"{file.sha256}"',
            "Location": f"{self.cdn}/{repo.replace('/', '_').replace('-', '_')}/{name}?Signature={signature}",
        }
        if file.sha256 in self.xet:
            route = f"{self.url}/api/models/{repo}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": self.xet[file.sha256], "X-Xet-Refresh-Route": route}
        with self._lock:
            self._signed_files()[signature] = file
        return self._send(handler, request, 302, b"", headers)

    def _signed_files(self) -> dict[str, Stored]:
        return self.__dict__.setdefault("_by_signature", {})  # type: ignore[no-any-return]

    def _cdn(self, handler: Any, request: Request, _: str, signature: str, fault: Fault | None) -> None:
        if request.token is not None:  # a token that has left the Hub
            return self._send(handler, request, 400, b"one way to log in at a time", {})
        if self.signed.get(signature, 0.0) < time.monotonic():
            return self._send(handler, request, 403, b"<Error>expired</Error>", {})
        file = self._signed_files()[signature]
        return self._file(handler, request, file, {"ETag": f'"{file.sha256}"'}, fault)

    def _file(self, handler: Any, request: Request, file: Stored, headers: dict[str, str], fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else ""
        first, last = 0, file.size - 1
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
        ranged = match is not None and kind != "ignore_range"
        if match is not None and ranged:
            first, last = int(match[1]), min(int(match[2] or last), last)
            if first >= file.size:
                return self._send(handler, request, 416, b"", {"Content-Range": f"bytes */{file.size}"})
            if kind == "shorter":
                last = first + (last - first) // 2
            if kind == "elsewhere":
                first, last = first + 1, last + 1
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{file.size}"}
        with file.path.open("rb") as source:
            source.seek(first)
            body = bytearray(source.read(last - first + 1))
        if kind == "flip":
            assert fault is not None
            body[fault.after % len(body)] ^= 1
        return self._send(handler, request, 206 if ranged else 200, bytes(body), headers, fault)

    def _json(self, handler: Any, request: Request, value: Any) -> None:
        self._send(handler, request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        handler: Any,
        request: Request,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        fault: Fault | None = None,
    ) -> None:
        request.status = status
        kind = fault.kind if fault is not None else ""
        after = fault.after if fault is not None else 0
        handler.send_response(status)
        length = {} if kind == "truncate" else {"Content-Length": str(len(body))}
        for name, value in {**length, **headers}.items():
            handler.send_header(name, value)
        if kind == "truncate":
            handler.send_header("Connection", "close")
        handler.end_headers()
        if handler.command == "HEAD":
            return
        request.sent = len(body)
        if kind in ("reset", "truncate", "slow", "stall"):
            request.sent = after
            handler.wfile.write(body[:after])
            handler.wfile.flush()
            if kind == "reset":
                linger = struct.pack("ii", 1, 0)  # no FIN but a RST
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                handler.close_connection = True
                os.close(handler.connection.detach())
                return
            if kind == "slow":
                for byte in body[after:]:
                    if self._stopping.wait(1.0):
                        break
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
            elif kind == "stall":
                self._stopping.wait(600)
            handler.close_connection = True
            handler.connection.close()
            return
        handler.wfile.write(body)
