"""Files that are there completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["write_atomically"]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is there completely or not at all, whenever the process or machine ends.

    Parameters
    ----------
    path
        Of the file; one that is there is replaced. Its folder must be there.
    write
        Is given the open file.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "numbers", lambda file: file.write(b"1 2 3"))
    ...     (Path(folder) / "numbers").read_bytes()
    b'1 2 3'
    """
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            # else the new name may reach the disk before the bytes do
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
