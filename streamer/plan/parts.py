"""Parts of a batch: which one a worker does, and where it keeps what it did."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError

MAX_PARTS = 10_000
_FOLDER = re.compile(r"(\d{1,5})-of-(\d{1,5})")


@dataclass(frozen=True, order=True)
class Part:
    """Part `number` (from 1 on) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that "2/8" names.

        Raises:
            RequestError: it names none.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
        if match and 1 <= int(match[1]) <= int(match[2]) <= MAX_PARTS:
            return cls(int(match[1]), int(match[2]))
        expected = f"I/N, such as 2/8: the parts of N count from 1 to N, and N is at most {MAX_PARTS}"
        raise RequestError(Offence("--part", "", expected, repr(text)))

    @classmethod
    def all(cls, count: int) -> list[Part]:
        """Every part of `count`, in order."""
        return [cls(number, count) for number in range(1, count + 1)]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.number}-of-{self.count}"

    def folder(self, output: Path) -> Path:
        """Where it keeps what it did of an output: its tensors, its journal and, once it is done, its record."""
        return parts_of(output) / self.name


def parts_of(output: Path) -> Path:
    """The folder beside an output that holds what many workers did of it, until `finish` puts it together."""
    return output.with_name(output.name + ".parts")


def parts_afar(url: str) -> str:
    """The same of an output in a bucket: a prefix beside its own."""
    return url.rstrip("/") + ".parts"


def parts_named(names: Iterable[str]) -> list[Part]:
    """The parts whose folders have these names, in whatever cuts."""
    matches = filter(None, map(_FOLDER.fullmatch, names))
    return sorted(Part(int(match[1]), int(match[2])) for match in matches)


def parts_there(output: Path) -> list[Part]:
    """The parts of an output that were begun, in whatever cuts."""
    folder = parts_of(output)
    return parts_named(path.name for path in folder.iterdir()) if folder.is_dir() else []


def place_of_parts_offences(output: Path) -> Iterator[Offence]:
    """Offences of what lies where the parts of an output are kept."""
    folder = parts_of(output)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        yield Offence(str(folder), "", "a folder for the parts of an output", "a file or a link", "remove it yourself")
