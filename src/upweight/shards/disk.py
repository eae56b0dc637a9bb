"""Files of which it is known that they are on disk, and a lock."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["append", "locked", "put", "sync", "telling"]

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def locked(path: Path, told: str) -> Generator[None]:
    """Hold a lock file, whose folder is made, so that no other process does so meanwhile.

    The system releases it when the process ends, however it ends.

    Raises
    ------
    BlockingIOError
        If it is held already.
    """
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder went away as another process finished
            continue
        try:
            _lock_or_raise(handle, path, told)
            there = path.stat()
            if (there.st_dev, there.st_ino) == _identity(handle):
                break
        except FileNotFoundError:
            pass  # the one who held it has finished, and removed it: what we hold has no name
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def _identity(handle: int) -> tuple[int, int]:
    own = os.fstat(handle)
    return own.st_dev, own.st_ino


def _lock_or_raise(handle: int, path: Path, told: str) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        holder = path.read_text(errors="replace") if sys.platform != "win32" else ""
        raise BlockingIOError(
            error.errno,
            f"{told} (process {holder or 'unknown'}): wait until it is done, or choose another "
            "path",
        ) from error


@contextmanager
def telling(what: str, kept: int = 0) -> Generator[None]:
    """Say of errors of the disk what they are about, and how many parts they leave."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        full = error.errno in FULL
        advice = ["make room"] if full else []
        if kept:
            advice.append(f"{kept} finished parts are kept, and the same call goes on from there")
        elif not full:
            advice.append("choose another path")
        raise OSError(
            error.errno, f"{what} ({error.strerror or error}): {'; '.join(advice)}"
        ) from error


def put(path: Path, offset: int, data: memoryview, whole: int) -> None:
    """Write at a place of a file that is made as long as it will be, and wait for the disk."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o644), "r+b") as file:
        if os.fstat(file.fileno()).st_size < whole:
            file.truncate(whole)
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, line: bytes) -> None:
    """Write at the end of a file, and wait for the disk."""
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if sys.platform == "win32" and path.is_dir():  # has no such call
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
