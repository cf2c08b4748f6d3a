"""Where the workers of a batch leave their parts of an output until `finish` puts them together: a folder beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from safeshard.manifests.errors import Offence
from safeshard.manifests.schema import JOURNAL_NAME
from safeshard.streamer.disk import clear_errors, sync_path, write_file
from safeshard.streamer.plan.job_plan import OutputFile
from safeshard.streamer.plan.ours import NUMBERS, PART_RECORD
from safeshard.streamer.plan.parts import Part, parts_of, parts_there, place_of_parts_offences
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.sources import LocalSource, Source
from safeshard.streamer.write.journal import Journal
from safeshard.streamer.write.part_record import Numbers, PartRecord, read_numbers, read_record
from safeshard.streamer.write.staging import part_of, remove


class Shelf(Protocol):
    """The parts of one output."""

    afar: bool

    def there(self) -> list[Part]:
        """The parts that were begun, in whatever cuts."""

    def offences(self) -> Iterator[Offence]:
        """Offences of what lies where the parts are kept."""

    def records(self, parts: Sequence[Part]) -> list[PartRecord | None]:
        """What each part did; None of one that is not finished."""

    def numbers(self, parts: Sequence[Part]) -> list[Numbers | None]:
        """What each part measured; None of one that has not come so far."""

    def leave(self, part: Part, numbers: Numbers, staging: Path) -> None:
        """Leave a part's numbers for the others. `staging` is where it works."""

    def is_whole(self, part: Part, files: Sequence[OutputFile], record: PartRecord) -> bool:
        """Whether the files that a finished part wrote are there."""

    def source(self, part: Part) -> Source:
        """The files that a part wrote, to read from."""

    def name_of(self, file: OutputFile, hashes: Mapping[str, str]) -> str:
        """The name there of a file of a part, by the hashes of its tensors."""

    def reopen(self, part: Part) -> None:
        """Let a part be finished no more."""

    def discard(self, part: Part) -> None:
        """Remove a part.

        Raises:
            HeldError: it is underway.
        """

    def clear(self) -> None:
        """Remove all parts."""


class FolderShelf:
    """The parts of an output that is a folder."""

    afar = False

    def __init__(self, output: Path) -> None:
        self.output = output

    def there(self) -> list[Part]:
        return parts_there(self.output)

    def offences(self) -> Iterator[Offence]:
        return place_of_parts_offences(self.output)

    def records(self, parts: Sequence[Part]) -> list[PartRecord | None]:
        return [read_record(part.folder(self.output)) for part in parts]

    def numbers(self, parts: Sequence[Part]) -> list[Numbers | None]:
        return [read_numbers(part.folder(self.output)) for part in parts]

    def leave(self, part: Part, numbers: Numbers, staging: Path) -> None:
        if read_numbers(staging) != numbers:
            with clear_errors(staging):
                write_file(staging / NUMBERS, numbers.to_bytes())
                sync_path(staging)

    def is_whole(self, part: Part, files: Sequence[OutputFile], record: PartRecord) -> bool:
        places = (part.folder(self.output), staging_of(self.output))  # `finish` may have moved some
        return all(any(_is_whole(part_of(place, file.name), file) for place in places) for file in files)

    def source(self, part: Part) -> Source:
        folder = part.folder(self.output)
        return LocalSource(folder, str(folder))

    def name_of(self, file: OutputFile, hashes: Mapping[str, str]) -> str:
        return part_of(self.output, file.name).name

    def reopen(self, part: Part) -> None:
        (part.folder(self.output) / PART_RECORD).unlink(missing_ok=True)

    def discard(self, part: Part) -> None:
        folder = part.folder(self.output)
        if (journal := folder / JOURNAL_NAME).is_file():
            with clear_errors(folder), Journal.claim(journal):
                remove(folder, folder)

    def clear(self) -> None:
        for part in self.there():
            remove(part.folder(self.output), part.folder(self.output))
        with contextlib.suppress(OSError):  # somebody else's is in it
            parts_of(self.output).rmdir()


def _is_whole(path: Path, file: OutputFile) -> bool:
    return path.is_file() and path.stat().st_size >= file.nbytes  # what many parts write to is larger
