"""A server of byte ranges on the loopback interface, as a web server and as a bucket: `sendfile` and nothing else.

It runs in a process of its own, waits before each answer as a server far away does, and counts the requests that are
under way at the same time: GET /peak tells, and starts anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

PAGE = '<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>'
ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{}&quot;</ETag>"
    "<Size>{}</Size></Contents>"
)


class RangeServer:
    """Serves a folder's files under any path that ends with their name."""

    def __init__(self, folder: Path, delay: float) -> None:
        self.folder, self.delay = folder, delay
        self.peak = self._under_way = 0
        self._lock = threading.Lock()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=256)

    def serve(self) -> None:
        """Accept connections until the process ends."""
        while True:
            connection, _ = self.socket.accept()
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                wanted = _range(lines)
                with self._lock:
                    self._under_way += 1
                    self.peak = max(self.peak, self._under_way)
                self._answer(connection, line.split()[1].decode(), wanted)
                with self._lock:
                    self._under_way -= 1

    def _answer(self, connection: socket.socket, target: str, wanted: tuple[int, int] | None) -> None:
        path, _, query = target.partition("?")
        if path == "/peak":
            body, self.peak = str(self.peak).encode(), 0
            return _send(connection, 200, body)
        time.sleep(self.delay)
        if match := re.search(r"prefix=([^&]*)", query):
            prefix = match[1].replace("%2F", "/")
            files = "".join(ENTRY.format(prefix + p.name, p.name, p.stat().st_size) for p in self.folder.iterdir())
            return _send(connection, 200, PAGE.format(files).encode())
        file = self.folder / path.rpartition("/")[2]
        if not file.is_file() or wanted is None:
            return _send(connection, 404, b"")
        size, (first, last) = file.stat().st_size, wanted
        head = f'HTTP/1.1 206 Partial Content\r\nContent-Length: {last - first + 1}\r\nETag: "{file.name}"\r\n'
        head += f"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Range: bytes {first}-{last}/{size}\r\n\r\n"
        connection.sendall(head.encode())
        with file.open("rb") as data:
            while first <= last:
                first += os.sendfile(connection.fileno(), data.fileno(), first, last - first + 1)
        return None


def _range(lines: BinaryIO) -> tuple[int, int] | None:
    """The range that a request's headers ask for."""
    wanted = None
    while (line := lines.readline()) not in (b"\r\n", b""):
        if match := re.fullmatch(rb"(?i)range: bytes=(\d+)-(\d+)\r\n", line):
            wanted = (int(match[1]), int(match[2]))
    return wanted


def _send(connection: socket.socket, status: int, body: bytes) -> None:
    connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


if __name__ == "__main__":
    server = RangeServer(Path(sys.argv[1]), float(sys.argv[2]))
    print(server.socket.getsockname()[1], flush=True)
    server.serve()
