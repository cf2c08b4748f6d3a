"""A folder behind an fsspec URL as a source."""

from __future__ import annotations

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import reason, refuse, require, short

RANGE_BYTES = 1 << 25  # of one remote read: a tensor is not held twice


class UrlSource:
    """Any folder that fsspec can list and read by ranges: s3://, gs://, memory://, ..."""

    revision: str | None = None

    def __init__(self, spec: str) -> None:
        import fsspec

        self.spec = self.identity = spec.rstrip("/")
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self.spec)
            entries = self._fs.ls(self._path, detail=True)
            self._sizes = {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        except ImportError as error:
            remedy = "pip install 'safeshard[hub-s3]', or the driver that is named"
            raise refuse(spec, "an installed fsspec driver", reason(error), remedy) from error
        except Exception as error:  # drivers raise what they like
            raise refuse(spec, "a folder that fsspec can list", reason(error), "correct the URL") from error

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def read(self, name: str, start: int, stop: int) -> bytes:
        require(self, name)
        where = f"{self.spec}/{name}"
        if start == stop:  # no range says this
            return b""
        try:
            data = bytes(self._fs.cat_file(f"{self._path}/{name}", start=start, end=stop))
        except Exception as error:  # drivers raise what they like
            raise RunError(f"{where}: {reason(error)}", "check the connection, then run again") from error
        if len(data) != stop - start:
            raise short(where, start + len(data), stop)
        return data

    def readinto(self, name: str, offset: int, view: memoryview) -> None:
        for begin in range(0, len(view), RANGE_BYTES):
            part = view[begin : begin + RANGE_BYTES]
            part[:] = self.read(name, offset + begin, offset + begin + len(part))

    def prefetch(self, name: str, offset: int, nbytes: int) -> None:
        pass

    def local_path(self, name: str) -> None:
        return None

    def changed(self) -> set[str]:
        return set()  # each range is a request of its own; only sizes were listed
