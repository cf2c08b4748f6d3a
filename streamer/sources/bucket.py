"""A folder in an object store as a source: s3://, gs:// and az://, through obstore."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from safeshard.streamer.sources.remote import Final
from safeshard.streamer.sources.url import Listed, RemoteFolder

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
CHUNK = 1 << 18


def has_obstore() -> bool:
    """Whether the extra `buckets` is installed."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        return False
    return True


class BucketSource(RemoteFolder):
    """A prefix in a bucket. Each object is pinned by the ETag that the listing gave: reads ask for no other."""

    expected = "a prefix in a bucket that can be listed"

    @cached_property
    def _store(self) -> ObjectStore:
        return open_store(self.url)

    def _list(self) -> Mapping[str, Listed]:
        listed = self._store.list_with_delimiter()["objects"]
        files = {m["path"].rpartition("/")[2]: Listed(m["size"], _tag(m["e_tag"]) or m["version"]) for m in listed}
        if not files:
            raise Final(f"{self.spec}: no object has this prefix", "check the bucket and the prefix")
        return files

    def _fetch(self, name: str, start: int, view: memoryview) -> int:
        file, position = self._files[name], 0
        options: dict[str, Any] = {"range": (start, start + len(view))}
        if file.mark is not None and '"' in file.mark:
            options["if_match"] = file.mark
        result = self._store.get(name, options=options)  # type: ignore[arg-type]
        if result.range != (start, start + len(view)) or result.meta["size"] != file.size:
            raise Final(f"{self.spec}/{name}: it changed while it was read", "run the same command again at rest")
        for chunk in result.stream(min_chunk_size=CHUNK):
            if self._line.stopped.is_set() or position + len(chunk) > len(view):
                break
            view[position : position + len(chunk)] = chunk
            position += len(chunk)
        return position


def _tag(listed: str | None) -> str | None:
    """An ETag as If-Match wants it: Azure's listings leave the quotes out."""
    return listed if not listed or '"' in listed else f'"{listed}"'


def open_store(url: str, retries: RetryConfig | None = None) -> ObjectStore:
    """The store of a prefix. Credentials, region and endpoint are those of the environment.

    `retries` are the store's own, beside those of `Line`, which says that it tries again: none by default.
    """
    from obstore.store import AzureStore, GCSStore, S3Store

    parts = urlsplit(url)
    bucket, prefix = parts.netloc.rpartition("@")[2], parts.path.strip("/") or None
    client: ClientConfig = {"connect_timeout": "10s", "timeout": "10m", "read_timeout": "30s"}
    retries = retries or {"max_retries": 0}
    kind = SCHEMES[parts.scheme]
    if kind == "gs":
        if os.environ.get("GOOGLE_BASE_URL", "").startswith("http://"):  # an emulator, or a proxy
            client["allow_http"] = True
        return GCSStore(bucket, prefix=prefix, client_options=client, retry_config=retries)
    if kind == "az":
        return AzureStore(container_name=bucket, prefix=prefix, client_options=client, retry_config=retries)
    if _endpoint().startswith("http://"):
        client["allow_http"] = True
    more: dict[str, Any] = dict(_profile())
    return S3Store(bucket, prefix=prefix, client_options=client, retry_config=retries, **more)


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _profile() -> Iterator[tuple[str, Any]]:
    """What obstore does not find out by itself: the endpoint for S3 alone, and the shared files of the AWS tools."""
    if endpoint := _endpoint():
        yield "endpoint", endpoint
    if not os.environ.get("AWS_ACCESS_KEY_ID") and not re.match("(?i)1|true", os.environ.get("AWS_SKIP_SIGNATURE", "")):
        try:
            import boto3
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            return
        session = boto3.Session()
        if session.get_credentials() is not None:
            yield "credential_provider", Boto3CredentialProvider(session)
        if session.region_name and not os.environ.get("AWS_REGION"):
            yield "region", session.region_name
