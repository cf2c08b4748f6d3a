"""The hidden states that a calibration has reached, on disk, so that an interrupted run goes on from there.

One file in the folder of an unfinished output, in the safetensors format, replaced as a whole: the hidden states that
enter a decoder layer, saved once all that the layers before it had to give is durable.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from safeshard.manifests.errors import RunError, printable
from safeshard.manifests.hashing import hash_bytes, hash_tensor_region
from safeshard.manifests.safetensors_header import layout, read_header
from safeshard.streamer.disk import open_own, sync_path

SAVED = "hidden-states.saved"
SPILL = ("hidden-states-", ".tmp")  # beginning and end of the name of a file that stands in for memory
COPIES = 2  # on disk at once: a save replaces the last one when it is whole
INTERVAL = 10.0  # the time between two saves, as a multiple of what a save takes
_BYTES_PER_SECOND = 5e8  # what the first save is taken to write, and the seconds it takes besides
_SYNC_SECONDS = 0.1
_NEW = "hidden-states.tmp"

_log = logging.getLogger(__name__)


@dataclass
class HiddenStates:
    """Where a calibration saves its hidden states, and finds those of an interrupted run.

    Attributes:
        folders: of the unfinished outputs that the calibration serves; the first is written to, all are searched.
        first: the first decoder layer with work left. States past it are of no use.
        commit: makes durable what the layers run so far have given.
    """

    folders: Sequence[Path]
    first: int = 0
    commit: Callable[[], None] = lambda: None
    _last: float = field(default_factory=time.monotonic)
    _cost: float | None = None

    def load(self, key: str, states: Tensor) -> int:
        """Fill `states` (flat, on the host) with the furthest saved ones; return the layer that they enter.

        0, and `states` as they were, where none are saved that are whole, not past `first`, and saved under `key`: a
        hash of all that hidden states depend on.
        """
        found = [_open(path, key, states.nbytes) for folder in self.folders if (path := folder / SAVED).exists()]
        for saved in sorted(filter(None, found), key=lambda saved: -saved.layer):
            if saved.layer > self.first:
                _log.warning("%s: layers before %d have work left", printable(str(saved.path)), saved.layer)
            elif saved.read(states):
                return saved.layer
        if found:
            _log.warning("calibration starts from the first layer")
        return 0

    def save(self, key: str, layer: int, states: Tensor) -> None:
        """Save the states that enter `layer`, if the last save is long enough ago to be worth the time.

        A disk without room is no reason to stop: what was saved before stays.
        """
        start = time.monotonic()
        cost = _SYNC_SECONDS + states.nbytes / _BYTES_PER_SECOND if self._cost is None else self._cost
        if start - self._last < INTERVAL * cost:
            return
        self.commit()
        folder, *others = self.folders
        try:
            _write(folder, key, layer, _bytes(states))
            for other in others:  # left by a run of fewer jobs, and now behind
                (other / SAVED).unlink(missing_ok=True)
        except OSError as error:
            (folder / _NEW).unlink(missing_ok=True)
            _log.warning("%s: hidden states not saved: %s", printable(str(folder)), error.strerror or error)
        self._last = time.monotonic()
        self._cost = self._last - start


class UnsavedStates(HiddenStates):
    """For a run beside another that saves: hidden states that are never on disk under a name."""

    def load(self, key: str, states: Tensor) -> int:
        return 0

    def save(self, key: str, layer: int, states: Tensor) -> None:
        pass


def clear_states(folders: Iterable[Path]) -> None:
    """Remove saved hidden states, and what a kill may have left of others: they are never published."""
    for folder in folders:
        for path in (folder / SAVED, folder / _NEW, *folder.glob("*".join(SPILL))):
            path.unlink(missing_ok=True)


def is_state(name: str) -> bool:
    """Whether a file holds hidden states."""
    return name in (SAVED, _NEW) or (name.startswith(SPILL[0]) and name.endswith(SPILL[1]))


@dataclass(frozen=True)
class _Saved:
    """Saved states by their file's header: the layer that they enter, where they lie, and their BLAKE3."""

    path: Path
    layer: int
    offset: int
    blake3: str

    def read(self, states: Tensor) -> bool:
        """Fill `states`; False, and they are as they were, where the file is damaged."""
        view = _bytes(states)
        with os.fdopen(open_own(self.path, os.O_RDONLY), "rb", buffering=0) as file:
            try:
                if hash_tensor_region(file.fileno(), self.offset, len(view)) != self.blake3:
                    raise EOFError("its bytes are not those that were saved")
            except (EOFError, OSError) as error:
                _log.warning("%s: %s", printable(str(self.path)), error)
                return False
            file.seek(self.offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise RunError(f"{self.path} changed while it was read", "run the same command again")
                view = view[count:]
        return True


def _open(path: Path, key: str, nbytes: int) -> _Saved | None:
    """Saved states under `key`, None where they are others, or none."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            header = read_header(
                path.name, os.fstat(file.fileno()).st_size, lambda a, b: os.pread(file.fileno(), b - a, a)
            )
        ref, metadata = header.tensors["hidden_states"], header.metadata
        layer = int(metadata["layer"])
        if metadata["key"] != key or ref.nbytes != nbytes or layer < 1:
            raise ValueError("those there are of another calibration")
        return _Saved(path, layer, ref.offset, metadata["blake3"])
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s: no hidden states to go on from: %s", printable(str(path)), printable(str(error)))
        return None


def _write(folder: Path, key: str, layer: int, data: memoryview) -> None:
    metadata = {"key": key, "layer": str(layer), "blake3": hash_bytes(data)}
    header, _ = layout(SAVED, [("hidden_states", "U8", (len(data),))], metadata)
    with os.fdopen(open_own(folder / _NEW, os.O_WRONLY | os.O_CREAT), "wb", buffering=0) as file:
        file.truncate(0)
        for part in (memoryview(header), data):
            while part:
                part = part[file.write(part) :]
        os.fsync(file.fileno())
    (folder / _NEW).replace(folder / SAVED)
    sync_path(folder)


def _bytes(states: Tensor) -> memoryview:
    view: memoryview = states.view(torch.uint8).numpy().data
    return view
