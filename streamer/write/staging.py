"""The folder beside an output that holds it while it is written, and the steps that give the output its name.

The journal is the first file to come and the last to go, first in `OUT.partial` and, for an instant, in OUT. So an
interruption at any step leaves a folder that is known to be ours and not quite done, and the journal's lock keeps
other runs away until the very end. Where the file system does not rename (some mounts of object stores), the complete
folder is copied instead: an empty journal comes into OUT first, the manifest last but for its removal.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safeshard.manifests.errors import Offence, RequestError
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME
from safeshard.streamer.disk import sync_path
from safeshard.streamer.plan.places import is_half_copied
from safeshard.streamer.write.journal import Journal

REPLACED = ".replaced"  # in the staging folder: the earlier output, until the new one has its place
NO_RENAME = (errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
log = logging.getLogger(__name__)


def open_journal(staging: Path, output: Path, fingerprint: dict[str, Any], overwrite: bool) -> Journal:
    """Make the staging folder with its journal, or open those of an interrupted run of this very request.

    With `overwrite`, those of another request are discarded.

    Raises:
        RequestError: the folder is somebody else's, another request's, or in use.
    """
    _check_ours(staging)
    path = staging / JOURNAL_NAME
    if staging.exists() and not path.is_file():
        remove(staging, output)
    _make_folder(staging)
    try:
        return Journal.open(path, fingerprint)
    except RequestError:
        if not overwrite:
            raise
    with Journal.claim(path):
        remove(staging, output)
    _make_folder(staging)
    return Journal.open(path, fingerprint)


def part_of(staging: Path, name: str) -> Path:
    """Where a safetensors file lies until the output is complete: no loader takes it for a model."""
    return staging / f"{name}.part"


def unname(staging: Path, names: Iterable[str]) -> None:
    """Take the safetensors files' names and the manifest back, where an interrupted run had come that far."""
    for name in names:
        if (staging / name).exists():
            (staging / name).rename(part_of(staging, name))
    (staging / MANIFEST_NAME).unlink(missing_ok=True)
    sync_path(staging)


def clear(staging: Path, names: Collection[str]) -> None:
    """Remove all but the parts of the safetensors files `names`: what an interrupted run or a calibration left."""
    kept = {JOURNAL_NAME, REPLACED, *(part_of(staging, name).name for name in names)}
    for path in staging.iterdir():
        if path.name not in kept:
            _remove(path)


def publish(staging: Path, output: Path, names: Collection[str], overwrite: bool, last: str = MANIFEST_NAME) -> None:
    """Give a complete and synced folder its name, in place of an earlier output if asked to.

    `names` are the files that lie under their `.part` names; without its file `last` no output counts as complete.
    """
    sync_path(staging)  # the manifest is there before anything could be taken for a model
    replace = overwrite or is_half_copied(staging, output, last)
    try:
        _rename(staging, output, names, replace)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        if not replace and output.exists() and any(output.iterdir()):  # it came meanwhile
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(output)) from error
        log.warning("%s: the file system does not rename (%s): the finished output is copied", output, error.strerror)
        _copy(staging, output, names, last)
    _settle(output)


def _rename(staging: Path, output: Path, names: Iterable[str], overwrite: bool) -> None:
    for name in names:
        part_of(staging, name).rename(staging / name)
    sync_path(staging)
    if overwrite and output.exists():
        _remove(staging / REPLACED)
        output.rename(staging / REPLACED)
        sync_path(staging)
        sync_path(output.parent)
    staging.rename(output)
    sync_path(output.parent)


def _copy(staging: Path, output: Path, names: Iterable[str], last: str) -> None:
    own_names = {part_of(staging, name).name: name for name in names}
    files = sorted(p for p in staging.iterdir() if p.name not in (JOURNAL_NAME, REPLACED, last))
    _make_folder(output)
    (output / JOURNAL_NAME).touch()
    sync_path(output)
    try:
        for path in (output / last, *output.iterdir()):
            if path.name != JOURNAL_NAME:
                _remove(path)
        for path in (*files, staging / last):
            target = output / own_names.get(path.name, path.name)
            shutil.copyfile(path, target)
            sync_path(target)
            sync_path(output)
    except BaseException:
        remove(output, staging)
        raise
    remove(staging, output)


def settle(staging: Path, output: Path) -> None:
    """Do what remains to be done where a run was interrupted when the output had its name already.

    Raises:
        RequestError: another run is doing it.
    """
    if (output / JOURNAL_NAME).is_file():
        with Journal.claim(output / JOURNAL_NAME):
            if (staging / JOURNAL_NAME).is_file():  # what was copied here
                with Journal.claim(staging / JOURNAL_NAME):
                    remove(staging, output)
            _settle(output)


def remove(staging: Path, output: Path) -> None:
    """Remove an unfinished output, its journal last; an output that it was about to replace stays."""
    if (staging / REPLACED).is_dir() and not output.exists():
        (staging / REPLACED).rename(output)
    for path in staging.iterdir():
        if path.name != JOURNAL_NAME:
            _remove(path)
    _remove(staging / JOURNAL_NAME)
    staging.rmdir()


def _settle(output: Path) -> None:
    _remove(output / REPLACED)
    sync_path(output)
    _remove(output / JOURNAL_NAME)
    sync_path(output)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_ours(staging: Path) -> None:
    """Refuse a folder that somebody else filled: it would be published, or removed."""
    ours = {JOURNAL_NAME, MANIFEST_NAME}
    filled = staging.exists() and any(staging.iterdir())
    if staging.is_symlink() or (filled and not any((staging / name).is_file() for name in ours)):
        expected = "an unfinished output of safeshard"
        raise RequestError(Offence(str(staging), "", expected, "another folder", "remove it yourself"))


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable in the one above it."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_path(folder.parent)
