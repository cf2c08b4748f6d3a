"""What was answered so far: JSON lines that are only ever appended to, so that an evaluation can go on.

A record is found by a key that is a hash of all that decides it: the model's files, the conversations of its batch, the
sampling. So another suite, or more models, in the same folder take over what is the same and ask the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safeshard.manifests.errors import Offence, RequestError
from safeshard.streamer.disk import clear_errors, open_own

FILE = "asked.jsonl"
BEGIN = b'{"key": "'  # of each record


class Store:
    """Texts by key. One process at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = path = folder.resolve() / FILE
        self._file: BinaryIO = os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RequestError(
                Offence("--output", str(folder), "a folder that no other run writes to", "one does", "wait for it")
            ) from None
        if not BEGIN.startswith(begin := self._file.read(len(BEGIN))):
            self._file.close()
            got = f"one that begins with {begin!r}"
            raise RequestError(
                Offence(str(path), "", "a file of answers that safeshard wrote", got, "choose another folder")
            )
        self._texts = self._read()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: str) -> list[str] | None:
        """The texts of a batch, if it was answered."""
        return self._texts.get(key)

    def put(self, key: str, texts: Sequence[str]) -> None:
        """Keep the texts of a batch, durably.

        Raises:
            RunError: the disk is full, or cannot be written. What was kept before stays.
        """
        self._texts[key] = list(texts)
        left = memoryview(json.dumps({"key": key, "texts": list(texts)}).encode() + b"\n")
        with clear_errors(self._path):
            while left:  # nothing stays in a buffer, to fail once more when the file is closed
                left = left[os.write(self._file.fileno(), left) :]
            os.fsync(self._file.fileno())

    def _read(self) -> dict[str, list[str]]:
        """All whole records; the torn end of an interrupted run is cut off."""
        self._file.seek(0)
        texts: dict[str, list[str]] = {}
        good = 0
        for line in self._file:
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or not all(isinstance(text, str) for text in record["texts"]):
                    break
                texts[str(record["key"])] = record["texts"]
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            good += len(line)
        self._file.truncate(good)
        return texts


def key_of(*facts: Any) -> str:
    """A hash of facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]
