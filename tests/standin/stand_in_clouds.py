"""Google's and Azure's stores on the loopback interface.

Azure's is Azurite, Microsoft's own emulator, where it is installed (`npm install azurite`; PATH or AZURITE name it). Of
Google's none speaks the XML API that obstore uses, but for its headers that is S3's: it is moto's S3 server with
Google's conditions (generations) and copies in front of it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

from obstore.store import AzureStore, GCSStore
from stand_in_bucket import StandinBucket

ACCOUNT = "devstoreaccount1"  # the emulator's, as its documents give it
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Cloud:
    """A bucket of another cloud: `env` is what makes clients find it."""

    def __init__(self, scheme: str, env: dict[str, str], store: Callable[[], Any]) -> None:
        self.scheme, self.env, self._store = scheme, env, store

    def add(self, prefix: str, folder: Path) -> str:
        """Upload a folder's files; returns its URL."""
        for path in sorted(folder.iterdir()):
            self._store().put(f"{prefix}/{path.name}", path.read_bytes())
        return f"{self.scheme}://models/{prefix}"

    def files(self, prefix: str) -> dict[str, bytes]:
        """Names below a prefix, and what is there."""
        store = self._store()
        names = [meta["path"] for page in store.list(prefix) for meta in page]
        return {name.removeprefix(f"{prefix}/"): bytes(store.get(name).bytes()) for name in names}

    def put(self, key: str, data: bytes) -> None:
        """Upload one object."""
        self._store().put(key, data)


def azurite() -> str | None:
    """The program, where it is installed."""
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


@contextmanager
def azure(folder: Path) -> Iterator[Cloud]:
    """Azurite with a container `models`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [str(azurite()), "--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    argv += [f"--blobPort={port}"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=folder) as process:
        try:
            _make_container(port)
            env = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}"}
            yield Cloud("az", env, lambda: AzureStore(container_name="models"))
        finally:
            process.terminate()


def _make_container(port: int) -> None:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    told = "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed = "PUT" + 12 * "\n" + told + f"/{ACCOUNT}/{ACCOUNT}/models\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("PUT", f"/{ACCOUNT}/models?restype=container", b"", headers)
            assert connection.getresponse().status == 201
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError


class StandinGoogle(StandinBucket):
    """Google's XML API as far as obstore speaks it, on moto's S3 server."""

    def __init__(self) -> None:
        self._generations: dict[str, int] = {}
        self._count = 0
        self._writes = threading.RLock()
        super().__init__()
        account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        env = {"GOOGLE_BASE_URL": self.url, "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}
        self.cloud = Cloud("gs", env, self._client_store)

    def _client_store(self) -> GCSStore:
        return GCSStore("models", client_options={"allow_http": True})

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if "HTTP_X_AMZ_DATE" in environ:  # moto's own client, which makes the bucket
            return super()._answer(environ, start)
        key, method, query = environ["PATH_INFO"], environ["REQUEST_METHOD"], environ["QUERY_STRING"]
        scope = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        environ["HTTP_AUTHORIZATION"] = scope  # by which moto knows the service
        if source := environ.pop("HTTP_X_GOOG_COPY_SOURCE", None):
            environ["HTTP_X_AMZ_COPY_SOURCE"] = source
        wanted = environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH")
        with self._writes:
            if wanted is not None and int(wanted) != self._generations.get(key, 0):
                start("412 Precondition Failed", [("Content-Length", "0")])
                return [b""]
            if method == "DELETE" and key not in self._generations:
                start("404 Not Found", [("Content-Length", "0")])
                return [b""]

            def begin(status: str, headers: list[tuple[str, str]]) -> None:
                done = method == "PUT" and "partNumber" not in query
                done |= method == "POST" and "uploadId" in query
                if status.startswith("2") and done:
                    self._count += 1
                    self._generations[key] = self._count
                if status.startswith("2") and method == "DELETE":
                    self._generations.pop(key, None)
                told = [("x-goog-generation", str(self._generations[key]))] if key in self._generations else []
                start(status, [*headers, *told])

            return super()._answer(environ, begin)
