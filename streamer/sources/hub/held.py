"""Small files held for a run."""

from __future__ import annotations

import os
import tempfile

from safeshard.manifests.errors import RunError
from safeshard.streamer.sources.base import reason, short

IN_MEMORY = 1 << 20  # a small file's bytes; a larger one is held in a file without a name


class Held:
    """A small file's bytes, held until the source is dropped: in memory, or in a file that has no name."""

    def __init__(self, where: str, data: bytes) -> None:
        """Hold `data`, the content of `where`.

        Raises:
            RunError: the folder for temporary files has no room.
        """
        self._data, self._file = data, None
        if len(data) > IN_MEMORY:
            try:
                self._file = tempfile.TemporaryFile(prefix="safeshard-")  # noqa: SIM115  # closed with the source
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                problem = f"{where} cannot be held in {tempfile.gettempdir()}: {reason(error)}"
                raise RunError(problem, "set TMPDIR to a larger disk, or give --cache") from error
            self._data = b""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        return self._data[start:stop] if self._file is None else os.pread(self._file.fileno(), stop - start, start)

    def readinto(self, where: str, offset: int, view: memoryview) -> None:
        """Fill `view`."""
        data = self.read(offset, offset + len(view))
        if len(data) < len(view):
            raise short(where, offset + len(data), offset + len(view))
        view[:] = data
