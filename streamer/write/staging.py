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

from safeshard.manifests.errors import Offence, RequestError, RunError, printable
from safeshard.manifests.schema import JOURNAL_NAME, MANIFEST_NAME
from safeshard.streamer.disk import sync_path, write_file
from safeshard.streamer.plan import ours
from safeshard.streamer.plan.ours import NUMBERS, PART, REPLACED
from safeshard.streamer.plan.written.own_place import staging_of
from safeshard.streamer.plan.written.places import is_half_copied, unfinished_offences
from safeshard.streamer.write.journal import HeldError, Journal

NO_RENAME = (errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
log = logging.getLogger(__name__)


def open_journal(staging: Path, output: Path, fingerprint: dict[str, Any], overwrite: bool) -> Journal:
    """Make the staging folder with its journal, or open those of an interrupted run of this very request.

    With `overwrite`, those of another request are discarded.

    Raises:
        RequestError: the folder is somebody else's, another request's, or in use.
    """
    if offences := list(unfinished_offences(staging)):  # it would be published, or removed
        raise RequestError(offences)
    path = staging / JOURNAL_NAME
    own = staging in (output, staging_of(output))  # not a part's, where another worker may be about to begin
    if own and staging.exists() and not path.exists():
        remove(staging, output)
    make_folder(staging)
    try:
        return Journal.open(path, fingerprint)
    except FileNotFoundError as error:  # another run removed the folder, in which it saw no journal yet
        offence = Offence(str(staging), "", "no other run with this output", "one that began just now", "run again")
        raise HeldError(offence) from error
    except RequestError:
        if not overwrite:
            raise
    with Journal.claim(path):
        remove(staging, output)
    make_folder(staging)
    return Journal.open(path, fingerprint)


def part_of(staging: Path, name: str) -> Path:
    """Where a safetensors file lies until the output is complete: no loader takes it for a model."""
    return staging / f"{name}{PART}"


def unname(staging: Path, names: Iterable[str]) -> None:
    """Take the safetensors files' names and the manifest back, where an interrupted run had come that far."""
    for name in names:
        if (staging / name).exists():
            (staging / name).rename(part_of(staging, name))
    (staging / MANIFEST_NAME).unlink(missing_ok=True)
    sync_path(staging)


def clear(staging: Path, names: Collection[str]) -> None:
    """Remove all but the parts of the safetensors files `names`: what an interrupted run or a calibration left.

    Raises:
        RunError: something is there that is not ours.
    """
    _refuse_strangers(staging)
    kept = {JOURNAL_NAME, REPLACED, NUMBERS, *(part_of(staging, name).name for name in names)}
    for path in staging.iterdir():
        if path.name not in kept:
            path.unlink()


def publish(staging: Path, output: Path, names: Collection[str], overwrite: bool, last: str = MANIFEST_NAME) -> None:
    """Give a complete and synced folder its name, in place of an earlier output if asked to.

    `names` are the files that lie under their `.part` names; without its file `last` no output counts as complete.
    """
    _refuse_strangers(staging)
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
        _refuse_strangers(output)
        ours.remove(staging / REPLACED, marked=True)
        output.rename(staging / REPLACED)
        sync_path(staging)
        sync_path(output.parent)
    staging.rename(output)
    sync_path(output.parent)


def _copy(staging: Path, output: Path, names: Iterable[str], last: str) -> None:
    own_names = {part_of(staging, name).name: name for name in names}
    files = sorted(p for p in staging.iterdir() if p.name not in (JOURNAL_NAME, REPLACED, last))
    make_folder(output)
    _refuse_strangers(output)
    earlier = [path for path in output.iterdir() if path.name != JOURNAL_NAME]
    names_after = [own_names.get(path.name, path.name) for path in (*files, staging / last)]
    if not ours.is_copy(output, torn=False):
        write_file(output / JOURNAL_NAME, ours.copy_mark([*names_after, *(path.name for path in earlier)]))
        sync_path(output)
    try:
        for path in sorted(earlier, key=lambda path: path.name != last):
            ours.remove(path, marked=True) if path.name == REPLACED else path.unlink()
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
    """Remove an unfinished output, its journal last; an output that it was about to replace stays, and strangers do."""
    if (staging / REPLACED).is_dir() and not output.exists():
        (staging / REPLACED).rename(output)
    if foreign := ours.remove(staging):
        log.warning("%s: left there, as it is not safeshard's: %s", staging, printable(", ".join(foreign)))


def _settle(output: Path) -> None:
    if foreign := ours.remove(output / REPLACED, marked=True):
        log.warning("%s: left there, as it is not safeshard's: %s", output / REPLACED, printable(", ".join(foreign)))
    sync_path(output)
    (output / JOURNAL_NAME).unlink(missing_ok=True)
    sync_path(output)


def _refuse_strangers(folder: Path) -> None:
    foreign = ours.strangers(folder)
    if foreign or (foreign is None and folder.exists()):
        problem = f"{folder} holds what safeshard did not write: {ours.listed(foreign or ['all of it'])}"
        raise RunError(problem, "move it elsewhere and run the same command again")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable in the one above it."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_path(folder.parent)
