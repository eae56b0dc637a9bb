"""Utilities that were computed, by what they are of: in memory, and in a file."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.frames import users_frame
from upweight.valuation.checks import count

if TYPE_CHECKING:
    from sqlite3 import Connection
    from typing import Self

__all__ = ["CacheWarning", "UtilityCache"]

T = TypeVar("T")

PRIVATE = "object-"  # problems that another process would mistake for its own
APPLICATION, VERSION = 0x7577_7574, 1  # marks in the file: whose it is, and its format
SCHEMA = (
    "CREATE TABLE problems (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    # `value` has no type: of type REAL, SQLite would drop the sign of -0.0
    "CREATE TABLE utilities (problem INTEGER NOT NULL, rows BLOB NOT NULL, value NOT NULL, "
    "PRIMARY KEY (problem, rows)) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
PATIENCE = 60.0  # seconds to wait for other processes
AT_ONCE = 500  # keys in a statement; some builds of SQLite take 999
MOVED = 8 | 4 << 8  # SQLITE_READONLY_DBMOVED
DAMAGED = (1, 11, 26)  # SQLITE_ERROR (a table is missing), SQLITE_CORRUPT, SQLITE_NOTADB


class CacheWarning(UserWarning):
    """The file of a cache could not be used."""


class UtilityCache:
    """Utilities that are known, by problem and set of rows.

    A set has one key, however it was come by: a digest of n and of which rows are in it. Memory
    holds the entries of this process, the file those of all processes that name it; they may use
    it at the same time, in threads too. Failures (NaN) are not kept.

    Parameters
    ----------
    path
        An SQLite file, made when first needed; default: memory only. A file that cannot be read, or
        is something else, is renamed to ``<name>.unreadable-<k>``, and a new one is made.
    max_entries
        That memory holds; the oldest are dropped. About 150 bytes each.

    Raises
    ------
    ValueError
        If the path is a folder, or `max_entries` no whole number of at least 1.

    Warns
    -----
    CacheWarning
        If the file is renamed; or cannot be written or read: then what is new is kept in memory
        alone, and a file that can still be read is.

    Notes
    -----
    Problems whose name begins with ``object-`` stay in memory. Pickling and copying give a cache
    with the same file and an empty memory. The number of entries (``len``) is that in memory.

    Examples
    --------
    >>> cache = UtilityCache()
    >>> keys = cache.keys(np.array([[True, False, True], [True, True, True]]))
    >>> cache.put("accuracy of iris", keys[:1], [0.25])
    >>> cache.get("accuracy of iris", keys)
    array([0.25, nan])
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_entries: int = 1_000_000
    ) -> None:
        self.path = None if path is None else Path(path).absolute()
        self.max_entries = count(max_entries, "max_entries", 1)
        if self.path is not None and self.path.is_dir():
            raise ValueError(f"expected path of a file; got {self.path}, which is a folder")
        self._file = None if self.path is None else _File(self.path)
        self._memory: dict[str, dict[bytes, float]] = {}
        self._added: deque[tuple[str, int]] = deque()  # how many, from the oldest on
        self._size = 0
        self._pid, self._lock = os.getpid(), threading.Lock()

    def keys(self, masks: NDArray[np.bool_]) -> list[bytes]:
        """Keys of sets: 16 bytes each.

        Parameters
        ----------
        masks
            (M, n) True where a row is in the set.

        Raises
        ------
        ValueError
            For anything else.
        """
        if masks.ndim != 2 or masks.dtype != np.bool_:
            raise ValueError(
                f"expected masks of shape (sets, rows) and type bool; got {masks.shape}, "
                f"{masks.dtype}"
            )
        packed = np.packbits(masks, axis=1)
        width, data = packed.shape[1], packed.tobytes()
        start = hashlib.blake2b(masks.shape[1].to_bytes(8, "little"), digest_size=16)
        keys: list[bytes] = []
        for at in range(0, len(masks) * width, width):
            of_set = start.copy()
            of_set.update(data[at : at + width])
            keys.append(of_set.digest())
        return keys

    def get(self, problem: str, keys: Sequence[bytes]) -> NDArray[np.float64]:
        """(M,) utilities of sets, NaN where they are not known."""
        with self._guard():
            known = self._memory.get(problem, {})
            found = list(map(known.get, keys))
            if self._file is not None and None in found and not problem.startswith(PRIVATE):
                missing = [key for key, value in zip(keys, found, strict=True) if value is None]
                read = self._file.read(problem, missing)
                if read:
                    self._keep(problem, read)
                    found = [
                        read.get(key) if value is None else value
                        for key, value in zip(keys, found, strict=True)
                    ]
        return np.array(found, np.float64)

    def put(self, problem: str, keys: Sequence[bytes], values: ArrayLike) -> None:
        """Keep (M,) utilities of sets, without those that are NaN."""
        array = np.asarray(values, np.float64)
        if array.shape != (len(keys),):
            raise ValueError(f"expected a value for each of {len(keys)} keys; got {array.shape}")
        there = ~np.isnan(array)
        entries = dict(zip(compress(keys, there), array[there].tolist(), strict=True))
        if not entries:
            return
        with self._guard():
            self._keep(problem, entries)
            if self._file is not None and not problem.startswith(PRIVATE):
                self._file.write(problem, entries)

    def close(self) -> None:
        """Close the file. It is opened again if need be."""
        with self._guard():
            if self._file is not None:
                self._file.close()

    def _guard(self) -> threading.Lock:
        if self._pid != os.getpid():  # after a fork: a thread that is not here may hold the lock
            self._pid, self._lock = os.getpid(), threading.Lock()
        return self._lock

    def _keep(self, problem: str, entries: dict[bytes, float]) -> None:
        known = self._memory.setdefault(problem, {})
        before = len(known)
        known.update(entries)
        new = len(known) - before
        if self._added and self._added[-1][0] == problem:
            new += self._added.pop()[1]
        if new:
            self._added.append((problem, new))
        self._size += len(known) - before
        if self._size > self.max_entries:
            # some more than must be: to find the first entry, a dict passes all that were dropped
            self._drop(self._size - self.max_entries + self.max_entries // 16)

    def _drop(self, number: int) -> None:
        self._size -= number
        oldest: Counter[str] = Counter()
        while number:
            problem, there = self._added.popleft()
            some = min(there, number)
            oldest[problem] += some
            if there > some:
                self._added.appendleft((problem, there - some))
            number -= some
        for problem, some in oldest.items():
            known = self._memory[problem]
            for key in list(islice(known, some)):
                del known[key]
            if not known:
                del self._memory[problem]

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        where = "" if self.path is None else f", {str(self.path)!r}"
        return f"<UtilityCache: {self._size} in memory{where}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_entries": self.max_entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], max_entries=state["max_entries"])


class _Unreadable(Exception):
    """The file is not what it should be."""


# Connections that came here by a fork. To close one could undo what its owner is writing.
_inherited: list[Connection] = []


class _File:
    """Entries in an SQLite file, with a rollback journal: a WAL fails on network folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: Connection | None = None
        self._pid = os.getpid()
        self._inode: tuple[int, int] | None = None
        self._reads = self._writes = True

    def read(self, problem: str, keys: list[bytes]) -> dict[bytes, float]:
        """Those of the keys that are there."""
        if not self._reads:
            return {}

        def action(connection: Connection) -> dict[bytes, float]:
            found: dict[bytes, float] = {}
            for at in range(0, len(keys), AT_ONCE):
                some = keys[at : at + AT_ONCE]
                marks = ",".join("?" * len(some))
                found.update(
                    connection.execute(
                        "SELECT rows, value FROM utilities WHERE problem = "
                        f"(SELECT id FROM problems WHERE name = ?) AND rows IN ({marks})",
                        (problem, *some),
                    )
                )
            if not all(type(value) is float for value in found.values()):
                raise _Unreadable("it holds a value that is not a number")
            return found

        return self._try(action, {})

    def write(self, problem: str, entries: dict[bytes, float]) -> None:
        """All of them or none."""
        if not self._writes:
            return

        def action(connection: Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR IGNORE INTO problems (name) VALUES (?)", (problem,))
            ((number,),) = connection.execute("SELECT id FROM problems WHERE name = ?", (problem,))
            connection.executemany(
                "INSERT OR REPLACE INTO utilities VALUES (?, ?, ?)",
                ((number, key, value) for key, value in entries.items()),
            )
            connection.execute("COMMIT")

        self._try(action, None, writing=True)

    def close(self) -> None:
        """Also ends what had been begun."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._pid == os.getpid():
            connection.close()
        else:
            _inherited.append(connection)

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _try(self, action: Callable[[Connection], T], nothing: T, *, writing: bool = False) -> T:
        import sqlite3

        for _ in range(3):  # a new file may be needed, perhaps once more if others make one too
            try:
                return action(self._open())
            except (sqlite3.Error, OSError, _Unreadable) as error:
                self.close()
                code = getattr(error, "sqlite_errorcode", 0)
                if code == MOVED:  # by another process, to which it was unreadable
                    continue
                if isinstance(error, _Unreadable) or code & 0xFF in DAMAGED:
                    if self._set_aside(error):
                        continue
                else:
                    self._give_up(error, writing)
                return nothing
            except BaseException:
                self.close()
                raise
        self._give_up("it was unreadable again and again", writing)
        return nothing

    def _open(self) -> Connection:
        import sqlite3

        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        self._connection, self._pid = connection, os.getpid()
        self._inode = _inode(self.path)
        if self._is_empty(connection):
            connection.execute("BEGIN IMMEDIATE")
            if self._is_empty(connection):  # still, now that no other process can write
                for statement in SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")
        return connection

    def _is_empty(self, connection: Connection) -> bool:
        """Whether it has nothing in it yet; _Unreadable if it is something else or cut off."""
        ours = not connection.in_transaction
        if ours:
            connection.execute("BEGIN")
        ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")  # locks
        application, version, pages, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version", "page_count", "page_size")
        )
        # SQLite takes what is missing of the last page for zeros, and those for values
        there = self.path.stat().st_size
        if ours:
            connection.execute("COMMIT")
        if there < pages * size and (there or tables):
            raise _Unreadable(f"it has {there} of {pages * size} bytes")
        if (tables, application, version) == (0, 0, 0):
            return True
        if application != APPLICATION:
            raise _Unreadable("it is another program's database")
        if version != VERSION:
            raise _Unreadable(f"its format is {version}, not {VERSION}")
        return False

    def _set_aside(self, why: Exception) -> bool:
        """Rename the file; False if that fails."""
        if _inode(self.path) != self._inode:
            return True  # another process has done it
        try:
            name = _rename(self.path)
        except OSError as error:
            self._give_up(f"{why}; it cannot be renamed: {error}", writing=False)
            return False
        _warn(f"{self.path} is not a cache of utilities ({why}): it is now {name}, and a new one")
        return True

    def _give_up(self, why: object, writing: bool) -> None:
        self._writes = False
        self._reads = self._reads and writing
        what = "written" if writing else "read"
        _warn(f"{self.path} cannot be {what} ({why}): utilities are kept in memory only")


def _rename(path: Path) -> str:
    """Give the file, and what SQLite keeps beside it, the first name that is free."""
    k = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.unreadable-{k}")):
        k += 1
    # the journal first: found beside a new file, it would be written into that
    for suffix in ("-journal", "-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{target}{suffix}")
    return target.name


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _warn(message: str) -> None:
    warnings.warn(message, CacheWarning, stacklevel=users_frame())
