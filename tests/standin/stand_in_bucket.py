"""moto's S3 server on the loopback interface, with faults in front of it, and every request kept."""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_REGION": "us-east-1"}


@dataclass
class Asked:
    """A request: `sent` are the bytes of its answer's body."""

    method: str
    path: str
    range: str | None
    if_match: str | None
    sent: int = 0


@dataclass
class Trouble:
    """What becomes of a request: another answer, or none: `lost` is done all the same, `reset` is not.

    `then` is called once a lost one is done.
    """

    status: int = 0
    code: str = ""
    kind: Literal["status", "lost", "reset"] = "status"
    then: Callable[[], object] = lambda: None


class StandinBucket:
    """A bucket of its own; `env` is what makes clients find it."""

    def __init__(self, bucket: str = "models") -> None:
        self.requests: list[Asked] = []
        self.before: Callable[[Asked], int | None] = lambda asked: None  # a status in place of an answer
        self.writing: Callable[[Asked], Trouble | None] = lambda asked: None  # the same of PUT, POST and DELETE
        self.striking: Callable[[Asked], Trouble | None] = lambda asked: None  # of all requests, before these two
        self.peak = self.under_way = 0
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.bucket, self.env = bucket, KEYS | {"AWS_ENDPOINT_URL": self.url}
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        key, secret, region = KEYS.values()
        self._client = boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id=key, aws_secret_access_key=secret, region_name=region
        )
        self._client.create_bucket(Bucket=bucket)

    def close(self) -> None:
        """Stop answering, and forget all objects."""
        self.striking = self.writing = lambda asked: None
        urllib.request.urlopen(f"{self.url}/moto-api/reset", data=b"", timeout=30).close()
        self.server.shutdown()
        self.server.server_close()

    def add(self, prefix: str, folder: Path) -> str:
        """Upload a folder's files; returns its URL."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.bucket}/{prefix}"

    def put(self, key: str, data: bytes) -> None:
        """Upload one object."""
        self._client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def names(self, prefix: str) -> dict[str, int]:
        """Names below a prefix, and sizes."""
        found = self._client.list_objects_v2(Bucket=self.bucket, Prefix=f"{prefix}/").get("Contents", [])
        return {each["Key"].removeprefix(f"{prefix}/"): each["Size"] for each in found}

    def get(self, key: str) -> bytes:
        """One object."""
        data: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def delete(self, key: str) -> None:
        """Remove one object."""
        self._client.delete_object(Bucket=self.bucket, Key=key)

    def objects(self) -> dict[str, tuple[bytes, str]]:
        """Every object's content and ETag, by name."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[self.bucket].keys
        return {name: (keys[name].value, keys[name].etag.strip('"')) for name in list(keys)}

    def restore(self, objects: dict[str, tuple[bytes, str]]) -> None:
        """Let there be these objects, and no upload underway."""
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.buckets[self.bucket].keys.clear()
        backend.buckets[self.bucket].multiparts.clear()
        for name, (data, tag) in objects.items():
            backend.put_object(self.bucket, name, data, etag=tag)

    def unfinished(self) -> int:
        """Uploads in parts that were begun and neither completed nor aborted."""
        return len(self._client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))

    def taken(self) -> list[Asked]:
        """The requests since the last call."""
        with self._lock:
            requests, self.requests = self.requests, []
        return requests

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        asked = Asked(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE"), environ.get("HTTP_IF_MATCH")
        )
        with self._lock:
            self.requests.append(asked)
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)
        try:
            reads = re.fullmatch("GET|HEAD", asked.method)
            trouble = self.striking(asked) or (None if reads else self.writing(asked))
            status = self.before(asked) if reads and trouble is None else None
            if trouble is not None and trouble.kind == "reset":
                raise ConnectionResetError
            if trouble is not None and trouble.kind == "status":
                body = [f"<Error><Code>{trouble.code}</Code><Message>fault</Message></Error>".encode()]
                start(f"{trouble.status} fault", [("Content-Length", str(len(body[0])))])
                return body
            if status is not None:
                start(f"{status} fault", [("Content-Length", "0")])
                return [b""]
            body = list(self._app(environ, start))
            if trouble is not None:
                trouble.then()
                raise ConnectionResetError
            asked.sent = sum(map(len, body))
            return body
        finally:
            with self._lock:
                self.under_way -= 1


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass

    def connection_dropped(self, *_: object) -> None:
        """Close it, lest the client wait for an answer until its patience ends."""
        self.close_connection = True
