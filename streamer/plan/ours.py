"""Which folders are ours to remove: those that bear our mark, and of what they hold only the names that we gave.

The mark is a journal of safeshard, a manifest, or an index of factors. A journal's first line and a manifest name the
files of their output; a file or folder beside those is somebody else's, and nothing here removes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from safeshard.manifests.errors import RequestError
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME, load
from safeshard.streamer.calibration.factor_files import FILE, INDEX, SCHEMA
from safeshard.streamer.calibration.hidden_states import is_state
from safeshard.streamer.disk import open_own

JOURNAL_MAGIC = b'{"journal":"safeshard.journal/1",'
REPLACED = ".replaced"  # in an unfinished output: the earlier one, until the new one has its place
PART_RECORD, NUMBERS = "part.json", "numbers.json"  # in the folder of a part of a batch: what it did, and measured
PART = ".part"  # ends the name of a safetensors file until the output is complete
_CRC = re.compile(rb',"crc":"[0-9a-f]{8}"\}$')  # how each of a journal's lines ends
_LINE_BYTES = 64 << 20  # of a journal's first line
_SCHEMA = re.compile(rb'\{\s*"schema":\s*"%s"' % SCHEMA.encode())  # how an index of factors begins
_MARKS = (MANIFEST_NAME, INDEX, JOURNAL_NAME)
_ALWAYS = {JOURNAL_NAME, MANIFEST_NAME, REPLACED, INDEX, PART_RECORD, NUMBERS, "README.md", "report.html", ".DS_Store"}
# What outputs consist of: version 0.1's journals do not name their files, and none names those written last.
USUAL = re.compile(
    rf"(adapter_)?model[\w-]*\.safetensors(\.part)?|{FILE}|model\.safetensors\.index\.json|(adapter_)?config\.json"
    r"|(generation|tokenizer|(pre)?processor)_config\.json|tokenizer\.(json|model)|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|tiktoken\.model|chat_template\.(jinja|json)"
)


def strangers(folder: Path, marked: bool = False) -> list[str] | None:
    """What is not ours in a folder that bears our mark; None where nothing marks it as ours, or it is no folder.

    An empty folder, and one with nothing but an empty journal, was begun and left: nothing in it is anybody's. With
    `marked` the folder lies in one of ours and needs no mark of its own.
    """
    before: tuple[list[str], list[str] | None] | None = None
    while _is_folder(folder):
        look = None
        with contextlib.suppress(FileNotFoundError):
            names = _names(folder)
            look = names, _strangers(folder, names, marked)
            if look[1] == [] or look == before:  # else another run may be at work there, whose files come and go
                return look[1]
        before = look
    return [] if marked and not os.path.lexists(folder) else None


def _strangers(folder: Path, names: list[str], marked: bool) -> list[str] | None:
    known = _known(folder)
    if known is None and not marked:
        begun = names == [JOURNAL_NAME] and _is_begun(folder / JOURNAL_NAME)
        return [] if begun or not names else None
    return [name for name in names if not _is_ours(folder, name, known or set())]


def remove(folder: Path, marked: bool = False) -> list[str]:
    """Remove what is ours in a folder, its marks last, and the folder where nothing else is in it.

    Returns what stayed: all of it where the folder is not ours. Raises OSError where the system does not let go of it.
    """
    if not os.path.lexists(folder):
        return []
    if (foreign := strangers(folder, marked)) is None:
        return _names(folder) if _is_folder(folder) else [folder.name]
    ours = [name for name in _names(folder) if name not in foreign]
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if REPLACED in ours:
            foreign += [f"{REPLACED}/{name}" for name in remove(folder / REPLACED, marked=True)]
        marks = [name for name in _MARKS if name in ours and not foreign]  # what stays keeps them
        for name in (*(name for name in ours if name not in (REPLACED, *_MARKS)), *marks):
            os.unlink(name, dir_fd=fd)  # pathlib has no descriptors
    finally:
        os.close(fd)
    if not foreign:
        folder.rmdir()
    return foreign


def is_copy(folder: Path, torn: bool = True) -> bool:
    """Whether a finished output was being copied here, file by file: its journal is a mark, perhaps a torn one."""
    path = folder / JOURNAL_NAME
    return (torn and _is_begun(path)) or _first_line(path).startswith(JOURNAL_MAGIC + b'"copy":')


def copy_mark(files: list[str]) -> bytes:
    """The mark of a folder that a finished output is copied to."""
    return JOURNAL_MAGIC + b'"copy":{"files":' + json.dumps(files).encode() + b"}}\n"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _known(folder: Path) -> set[str] | None:
    """The names that the marks in a folder give to files; None without a mark."""
    known: set[str] = set()
    marked = False
    line = _first_line(folder / JOURNAL_NAME)
    if line.startswith(JOURNAL_MAGIC) or _CRC.search(line):
        marked = True
        known |= _files_of_journal(line)
    with contextlib.suppress(RequestError, OSError):
        known |= {file.name for file in load(folder / MANIFEST_NAME).files}
        marked = True
    return known if marked or _is_index(folder / INDEX) else None


def _files_of_journal(line: bytes) -> set[str]:
    try:
        first = json.loads(line)
        files = (first.get("fingerprint") or first.get("copy") or first)["files"]
        return {name for name in files if isinstance(name, str)}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return set()


def files_of_journal(text: bytes, kind: str) -> set[str]:
    """The files that a whole journal names: in its first line, and in its records of one kind."""
    first, *lines = text.split(b"\n")
    known = _files_of_journal(first)
    for line in lines:
        if line.startswith(b'{"kind":"%s",' % kind.encode()):
            known |= _files_of_journal(line)
    return known


def _is_ours(folder: Path, name: str, known: set[str]) -> bool:
    kind = (folder / name).lstat().st_mode
    if name == REPLACED:
        return stat.S_ISDIR(kind)
    if stat.S_ISDIR(kind):
        return False
    return (
        name in _ALWAYS
        or {name, name.removesuffix(PART)} & known != set()
        or bool(is_state(name) or USUAL.fullmatch(name))
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _first_line(path: Path) -> bytes:
    with _opened(path) as file:
        return file.readline(_LINE_BYTES).removesuffix(b"\n")


def _is_begun(path: Path) -> bool:
    """Whether a journal's first line was never written, or torn at its very beginning."""
    if not os.path.lexists(path):
        return False
    with _opened(path) as file:
        content = file.read(len(JOURNAL_MAGIC)).rstrip(b"\0")
    return content != JOURNAL_MAGIC and JOURNAL_MAGIC.startswith(content)


def _is_index(path: Path) -> bool:
    with _opened(path) as file:
        content = file.read(200)
    return bool(_SCHEMA.match(content))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file of ours to read; empty where there is none, or something else: a link, a pipe."""
    try:
        fd = open_own(path, os.O_RDONLY)
    except (OSError, RequestError):
        yield io.BytesIO()
        return
    with os.fdopen(fd, "rb") as file:
        yield file


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
