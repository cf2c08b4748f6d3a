"""Folders of synthetic safetensors files, written at disk speed, whole or not at all.

The values are random; none is zero, of those in fp8 hardly any. They repeat after a few million elements, which no
measurement here can notice.
A file may repeat the data of another under names of its own; a file system with reflinks (XFS, btrfs) keeps it once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.safetensors_header import TensorRef, layout
from safeshard.manifests.sizes import human
from safeshard.streamer.inputs.read import TORCH_DTYPES

Sizes = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype and shape
POOL = (1 << 22) + 1  # odd, so that tensors start at ever new places of the pool
BLOCK = 4096  # file systems share whole blocks
FICLONE = 0x40049409  # Linux's request to share all data of a file
SCALES = ".weight_scale_inv"  # tensors whose names end so have positive values
CODE = 64  # of the values of fp8, which go to 448, the standard deviation


class Values:
    """An endless stream of values around zero: aligned weights, or those plus a delta."""

    def __init__(self, seed: int, delta_seed: int | None, scale: float) -> None:
        self._values, self._scale, self._at = torch.randn(POOL, generator=_seeded(seed)) * scale, scale, 0
        if delta_seed is not None:
            self._values += torch.randn(POOL, generator=_seeded(delta_seed)) * scale / 10
        self._pools: dict[tuple[str, bool], Tensor] = {}

    def take(self, name: str, dtype: str, count: int) -> Iterator[Tensor]:
        """The next `count` values, in pieces, for a tensor of this name and dtype."""
        key = (dtype, name.endswith(SCALES))
        if key not in self._pools:
            self._pools[key] = self._pool(*key)
        while count:
            piece = self._pools[key][self._at : self._at + count]
            yield piece
            count -= len(piece)
            self._at = (self._at + len(piece)) % POOL

    def _pool(self, dtype: str, scales: bool) -> Tensor:
        if scales:
            return (self._values.abs() / CODE).to(TORCH_DTYPES[dtype])
        return (self._values * (CODE / self._scale if dtype == "F8_E4M3" else 1)).to(TORCH_DTYPES[dtype])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class File:
    """A safetensors file to be made: its tensors, where its data is aligned to, and the file whose data it repeats."""

    sizes: Sizes
    alignment: int = 8
    source: str | None = None

    def layout(self, name: str) -> tuple[bytes, list[TensorRef]]:
        """The header, padded with spaces as the format allows, and the tensors in the order of their data."""
        header, refs = layout(name, [(n, dtype, size) for n, (dtype, size) in self.sizes.items()], {"format": "pt"})
        text = header[8:] + b" " * (-len(header) % self.alignment)
        return len(text).to_bytes(8, "little") + text, sorted(refs.values(), key=lambda ref: ref.offset)

    @property
    def nbytes(self) -> int:
        """Without the header."""
        return sum(ref.nbytes for ref in self.layout("")[1])


@dataclass(frozen=True)
class Folder:
    """A folder to be made: safetensors files and texts by name."""

    files: Mapping[str, File]
    texts: Mapping[str, str]
    values: Values

    def nbytes(self, shared: bool) -> int:
        """What it takes on the disk, in bytes, without headers; `shared` where repeated data takes nothing."""
        files = [file for file in self.files.values() if not (shared and file.source)]
        return sum(file.nbytes for file in files)


def check(below: Path, folders: Mapping[Path, Folder]) -> None:
    """Refuse what is there and holds something else, and what would not fit on the disk."""
    got = "another one, or an unfinished one"
    offences = [
        Offence("--folder", str(path), "the model asked for", got, "remove it")
        for path, content in folders.items() if path.exists() and not _is_made(path, content)
    ]  # fmt: skip
    below.mkdir(parents=True, exist_ok=True)
    shared = _shares(below)
    needed = sum(content.nbytes(shared) for path, content in folders.items() if not path.exists())
    if needed > (free := shutil.disk_usage(below).free):
        remedy = "free some, or see --repeat" + " on a file system with reflinks, such as XFS or btrfs" * (not shared)
        facts = f"{human(needed)} free", human(free)
        offences.append(Offence("--folder", str(below), *facts, remedy))
    if offences:
        raise RequestError(offences)


def _shares(folder: Path) -> bool:
    """Whether files in the folder can share data."""
    with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as copy:
        source.write(bytes(BLOCK))
        source.flush()
        try:
            fcntl.ioctl(copy, FICLONE, source.fileno())
        except OSError:
            return False
    return True


def _is_made(path: Path, content: Folder) -> bool:
    return (
        all((path / name).is_file() for name in (*content.files, *content.texts))
        and all((path / name).read_text() == text for name, text in content.texts.items())
        and all(_has_layout(path / name, file) for name, file in content.files.items())
    )


def _has_layout(path: Path, content: File) -> bool:
    header, refs = content.layout(path.name)
    with path.open("rb") as file:
        same_header = file.read(len(header)) == header
    return same_header and path.stat().st_size == len(header) + sum(ref.nbytes for ref in refs)


def make(path: Path, content: Folder) -> None:
    """Write a folder whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as scratch:
        folder = Path(scratch, path.name)
        folder.mkdir()
        for name, file in content.files.items():
            _write(folder / name, file, content.values)
        for name, text in content.texts.items():
            (folder / name).write_text(text)
        folder.rename(path)


def _write(path: Path, content: File, values: Values) -> None:
    header, refs = content.layout(path.name)
    with path.open("wb") as file:
        file.write(header)
        if content.source is not None:
            file.flush()
            _repeat(path.with_name(content.source), file.fileno(), len(header))
            return
        for ref in refs:
            for piece in values.take(ref.name, ref.dtype, ref.numel):
                file.write(piece.view(torch.uint8).numpy().data)


def _repeat(source: Path, target: int, position: int) -> None:
    """Append the data of a file, shared where the file system can; it starts at a block in both."""
    with source.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        end = source.stat().st_size
        while start < end:
            count = os.copy_file_range(file.fileno(), target, end - start, start, position)
            start, position = start + count, position + count
