"""Writing to a disk that may be full, slow to tell, or unable: what the operating system says, in a user's words."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from safeshard.manifests.errors import Offence, RequestError, RunError
from safeshard.manifests.safetensors_header import TensorRef


@contextlib.contextmanager
def clear_errors(place: Path) -> Iterator[None]:
    """Turn an OSError about `place` into a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        where = f"{place}: {error.filename}" if error.filename and str(error.filename) != str(place) else str(place)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{where}: the disk is full", "free some space and run the same command again") from error
        if error.errno == errno.EFBIG:
            problem = f"{where}: the file grows too large for the file system or `ulimit -f`"
            raise RunError(problem, "raise the limit, or write elsewhere") from error
        raise RunError(f"{where}: {error.strerror or error}", "mend it and run the same command again") from error


def open_own(path: Path, flags: int) -> int:
    """Open a file of ours, or make it: a descriptor.

    Nothing that was planted is followed: the folder is opened first and is no link, the file is no link and no pipe,
    and no other name leads to it. Whoever makes a file gets its mode from the umask.

    Raises:
        RequestError: something else lies there.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fd = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise
        raise _planted(path, "a link, a pipe or a folder") from error
    finally:
        os.close(folder)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        got = "a file with other names (hard links)" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise _planted(path, got)
    return fd


def _planted(path: Path, got: str) -> RequestError:
    return RequestError(Offence(str(path), "", "a file of safeshard's own", got, "remove it yourself, then run again"))


def write_file(path: Path, data: bytes) -> None:
    """Write a small file of ours, synced. Its name lasts once its folder is synced."""
    fd = open_own(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(fd, 0)
        write_all(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or as it was before."""
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent.resolve() / f".{path.name}.{os.getpid()}.part"
        draft.unlink(missing_ok=True)
        try:
            write_file(draft, data)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        count = os.pwrite(fd, data, offset)
        if not count:
            raise OSError(errno.EIO, "nothing could be written")
        data, offset = data[count:], offset + count


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the kernel begin to write a range to the disk, so that the sync at the end finds little left to do."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)  # which keeps what is not written yet


def allocate(fd: int, size: int) -> None:
    """Give a file its size, and its room on the disk where the file system can."""
    reserve(fd, size)
    os.ftruncate(fd, size)


def reserve(fd: int, size: int) -> None:
    """Take room on the disk for a file, where the system and the file system can (macOS cannot)."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)  # a disk too small shows now, not hours later
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def copy_range(path: Path, target: int, offset: int, ref: TensorRef) -> bool:
    """Copy inside the kernel; False where the system or the file system cannot."""
    if not hasattr(os, "copy_file_range"):
        return False
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < ref.nbytes:
            count = os.copy_file_range(source, target, ref.nbytes - done, offset + done, ref.offset + done)
            if count == 0:
                raise RunError(
                    f"{path} ends early: it changed while it was read", "restore it and run the same command again"
                )
            done += count
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(source)
    return True


def sync_path(path: Path) -> None:
    """Make a file, or a folder's list of names, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_file(file: Path, suffixes: Sequence[str], overwrite: bool, option: str = "--output") -> None:
    """Refuse a file that could not be written once all is computed."""
    if file.suffix not in suffixes:
        expected = f"a {' or '.join(suffixes)} file"
        raise RequestError(Offence(option, str(file), expected, file.suffix or "no suffix"))
    try:
        exists = file.exists()
        if exists and not overwrite and not file.is_dir():
            remedy = "choose another, or --overwrite"
            raise RequestError(Offence(option, str(file), "a new file", "one that exists already", remedy))
        place = file if exists else next(p for p in file.absolute().parents if p.exists())
        got = "" if os.access(place, os.W_OK) else f"no right to write to {place}"
        if exists == place.is_dir():  # a folder to replace, or a file to write below
            got = f"{place} is a {'folder' if exists else 'file'}"
    except OSError as error:
        got = error.strerror or "an unreadable place"
    if got:
        raise RequestError(Offence(option, str(file), "a file that can be written", got, "choose another"))
