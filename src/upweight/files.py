"""Files that are there completely or not at all."""

from __future__ import annotations

import os
import uuid
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
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "numbers", lambda file: file.write(b"1 2 3"))
    ...     (Path(folder) / "numbers").read_bytes()
    b'1 2 3'
    """
    # not by tempfile, whose files are for their maker's eyes alone
    name = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with name.open("xb") as file:
            write(file)
            file.flush()
            # else the new name may reach the disk before the bytes do
            os.fsync(file.fileno())
        name.replace(path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
