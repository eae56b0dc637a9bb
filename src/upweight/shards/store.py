"""A matrix on its way to disk, in shards that survive the end of the process.

While it is written, ``.NAME.partial`` lies beside its place. In it are the array (``result``), what
it is of (``work.json``), and a line with a checksum for every part that is on disk (``done.log``).
What has no line does not count. At the end ``result`` takes the name in one step. Several processes
may write shards of their own, each with its own log; the first of them does everything else.

Letters: m test rows, n training rows. A shard is a slice of the training rows, as wide as a chunk
of the zarr array; a part is what a group of test rows has in one shard. The lines of a chunk lie
one after the other in its file, so that any group is a range of bytes there, of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from upweight.shards import disk
from upweight.shards.log import append_log, log_name, logs, read_log
from upweight.shards.writers import Writers

__all__ = ["ShardStore", "refuse_existing", "sizes"]

# A chunk is about 8 MB in float64, long in the training rows: that is how they are read.
NUMBERS = 2**20
ROWS, WIDTH, LEAST_WIDTH = 256, 4096, 256
# Numbers of gradients in a shard: what is lost when the process ends. Large models have short ones.
GRADIENT_NUMBERS = 2**31
# Numbers of a part, which is in memory until it is whole.
HELD_NUMBERS = 2**25

WORK, RESULT, LOCK = "work.json", "result", "lock"
WAYS_OUT = "remove it, start anew with resume=False, or choose another path"

Part = tuple[int, int, int]  # first and last + 1 of the test rows, number of the shard


def sizes(shape: Sequence[int], parameters: int) -> tuple[int, int]:
    """Lines and columns of a chunk of a matrix (m, n, …); the columns are a shard.

    They depend on nothing but the shape and the number of parameters, so that a run finds the
    shards of an earlier one.

    Examples
    --------
    >>> sizes((1000, 50_000), parameters=1000)
    (256, 4096)
    >>> sizes((1000, 50_000), parameters=124_000_000)
    (256, 256)
    """
    m, n = shape[:2]
    pair = max(1, math.prod(shape[2:]))
    wide = min(WIDTH, max(LEAST_WIDTH, GRADIENT_NUMBERS // max(1, parameters)))
    width = max(1, min(n, wide, HELD_NUMBERS // (m * pair), NUMBERS // pair))
    return max(1, min(m, ROWS, NUMBERS // (width * pair))), width


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if something is at `path`."""
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already: choose another path, or remove it first")


class ShardStore:
    """A matrix (m, n, …) that is written part by part, and goes on where an earlier one stopped.

    To be used in a ``with`` block. If that ends with an exception, the parts that are on disk are
    kept; if there are none, nothing is left.

    Parameters
    ----------
    path
        Where the folder with the array ``values`` appears when it is complete.
    shape, dtype
        Of the matrix.
    chunk
        Lines and columns of a chunk, as from `sizes`.
    work
        What the numbers depend on, for JSON. An earlier store is gone on with only if it is the
        same.
    resume
        False: begin anew, whatever is there.
    writers
        The processes that write it together; None for one alone. Only `work` of the first counts.

    Attributes
    ----------
    shards
        Consecutive slices of the training rows.
    mine
        The numbers of those that this process writes.
    result
        The folder that will take the name `path`; more files may be put there before `finish`.
    notes
        What was noted of groups of test rows, by their first and last + 1.

    Raises
    ------
    FileExistsError
        If something is at `path`.
    BlockingIOError
        If another process is writing there.
    ValueError
        If the earlier store is of other work; the message names what differs.
    OSError
        If the folder cannot be written to, or the disk has too little space.

    Examples
    --------
    >>> import tempfile, zarr
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/a"
    ...     with ShardStore(path, (2, 3), torch.float32, (2, 2), {"of": "an example"}) as store:
    ...         for shard in store.shards:
    ...             store.write(slice(0, 2), shard, torch.ones(2, shard.stop - shard.start))
    ...         store.finish()
    ...     zarr.open_array(store=f"{path}/values", mode="r")[:].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: torch.dtype,
        chunk: tuple[int, int],
        work: Mapping[str, Any],
        *,
        resume: bool = True,
        writers: Writers | None = None,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.result = self.partial / RESULT
        self.shape, (self._lines, width) = tuple(shape), chunk
        self.shards = [slice(s, min(s + width, shape[1])) for s in range(0, shape[1], width)]
        self.notes: dict[tuple[int, int], dict[str, Any]] = {}
        self._width, self._resume = width, resume
        self._dtype = np.dtype(str(dtype).removeprefix("torch.")).newbyteorder("<")
        # through JSON: what is compared later has been there
        self._work: dict[str, Any] = json.loads(json.dumps(dict(work)))
        self._records: dict[Part, str] = {}
        self._covered: set[Part] = set()
        self._piece: tuple[Part, np.ndarray] | None = None
        self._filled = 0
        self._lock = disk.locked(self.partial / LOCK, f"another process is writing {self.path}")
        self._ours = self._finished = False
        self.mine = frozenset(range(len(self.shards)))
        self._writers = writers
        self._first = writers is None or writers.rank == 0
        self._log = self.partial / log_name(0 if writers is None else writers.rank)

    # --- open and close --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if not self._first:
            self._join()
            return self
        refuse_existing(self.path)
        with self.telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.__enter__()
        try:
            self._open()
            self._join()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._first:
            return
        others = any(log.stat().st_size for log in logs(self.partial) if log != self._log)
        empty = not (self._records or others)
        remove = self._finished or (kind is not None and self._ours and empty)
        remove |= self.partial.is_dir() and os.listdir(self.partial) == [LOCK]
        windows = sys.platform == "win32"  # removes no file that is open, as the lock is
        if remove and not windows:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.__exit__(None, None, None)
        if remove and windows:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _open(self) -> None:
        refuse_existing(self.path)  # it may have appeared before the lock was ours
        there = self._read_work() if self._resume else None
        if there is not None:
            self._compare(there)
            self._ours = True
            with disk.telling(f"{self.partial} cannot be read"):
                for entry in (entry for log in logs(self.partial) for entry in read_log(log)):
                    start, stop = entry["rows"]
                    if "note" in entry:
                        self.notes[start, stop] = entry["note"]
                    else:
                        self._records[start, stop, entry["shard"]] = entry["blake2b"]
                self._verify()
        else:
            self._clear()
            self._ours = True
        self._check_space()
        if there is None:
            with self.telling():
                self._create()

    def _join(self) -> None:
        """Let all writers know what is on disk, and share what is not."""
        if self._writers is None:
            return
        notes = [(*key, note) for key, note in self.notes.items()]
        there = [(*part, digest) for part, digest in self._records.items()]
        there, notes = self._writers.tell(f"parts of {self.path} on disk", [there, notes])
        self._records = {(start, stop, at): digest for start, stop, at, digest in there}
        self.notes = {(start, stop): note for start, stop, note in notes}
        lines = [float(self.shape[0]) for _ in self.shards]
        for start, stop, at in self._records:
            lines[at] -= stop - start
        owners = self._writers.assign(lines)
        self.mine = frozenset(at for at, who in enumerate(owners) if who == self._writers.rank)

    def collect(self) -> None:
        """Wait until all writers have done their parts; their notes are here then."""
        if self._writers is None:
            return
        notes = [(*key, note) for key, note in self.notes.items()]
        every = self._writers.meet(f"parts of {self.path}", [sorted(self._covered), notes])
        for covered, notes in every:
            self._covered |= {(start, stop, at) for start, stop, at in covered}
            self.notes |= {(start, stop): note for start, stop, note in notes}

    def _read_work(self) -> dict[str, Any] | None:
        try:
            text = (self.partial / WORK).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        if not self.result.is_dir():  # it took its name, and the process ended right then
            return None
        try:
            there = json.loads(text)
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise ValueError(f"{self.partial / WORK} is damaged: {WAYS_OUT}")
        return there

    def _compare(self, there: Mapping[str, Any]) -> None:
        different = [
            f"{name}: {_short(there.get(name))} there, {_short(self._work.get(name))} now"
            for name in dict.fromkeys([*self._work, *there])
            if there.get(name) != self._work.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.partial} is of other scores than these ({'; '.join(different)}): {WAYS_OUT}"
            )

    def _clear(self) -> None:
        own = {WORK, RESULT, LOCK, f"{WORK}.new", *(log.name for log in logs(self.partial))}
        foreign = sorted(e.name for e in self.partial.iterdir() if e.name not in own)
        if foreign:
            (self.partial / LOCK).unlink()
            raise FileExistsError(
                f"expected {self.partial} to be of unfinished scores; it has {foreign[0]}. Remove "
                "it, or choose another path"
            )
        (self.partial / WORK).unlink(missing_ok=True)  # first: without it nothing else counts
        for log in logs(self.partial):
            log.unlink(missing_ok=True)
        if self.result.exists():
            shutil.rmtree(self.result)

    def _create(self) -> None:
        import zarr

        zarr.create_array(
            store=os.fspath(self.result / "values"),
            shape=self.shape,
            chunks=(self._lines, self._width, *self.shape[2:]),
            dtype=self._dtype,
            compressors=None,
        )
        new = self.partial / f"{WORK}.new"
        new.write_text(json.dumps(self._work, indent=1), encoding="utf-8")
        disk.sync(new)
        os.replace(new, self.partial / WORK)
        disk.sync(self.partial)

    def _check_space(self) -> None:
        m, n = self.shape[:2]
        lines = -(-m // self._lines) * self._lines
        columns = -(-n // self._width) * self._width
        there = sum((stop - start) * self._line_bytes for start, stop, _ in self._records)
        needed = lines * columns * self._line_bytes // self._width - there
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.path} needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on "
                "its disk: make room, score fewer rows, or choose another path",
            )

    def telling(self) -> AbstractContextManager[None]:
        """Errors of the disk in the block say what is kept."""
        return disk.telling(f"{self.path} cannot be written", len(self._records))

    # --- parts -----------------------------------------------------------------------------------

    @property
    def _line_bytes(self) -> int:
        """Of one test row in a chunk."""
        return self._width * math.prod(self.shape[2:]) * self._dtype.itemsize

    def done(self, rows: slice, shard: slice) -> bool:
        """Whether this part is on disk, or for another process to write."""
        if shard.start // self._width not in self.mine:
            return True
        part = (rows.start, rows.stop, shard.start // self._width)
        if part in self._records:
            self._covered.add(part)
        return part in self._records

    def missing(self, rows: slice) -> int:
        """In how many shards of this process these test rows have no part on disk."""
        start, stop = rows.start, rows.stop
        return sum((start, stop, at) not in self._records for at in self.mine)

    def note(self, rows: slice, note: Mapping[str, Any]) -> None:
        """Keep something about a group of test rows."""
        with self.telling():
            append_log(self._log, {"rows": [rows.start, rows.stop], "note": dict(note)})
        self.notes[rows.start, rows.stop] = dict(note)

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """Set the block at these test rows and training columns.

        The blocks of a part come one after the other; with the last it goes to disk.

        Raises
        ------
        ValueError
            If a block crosses the border of its shard, or does not follow the one before.
        OSError
            If it cannot be written, as where the disk is full; the parts on disk are kept.
        """
        part = (rows.start, rows.stop, columns.start // self._width)
        shard = self.shards[part[2]]
        if self._piece is None:
            held = (rows.stop - rows.start, self._width, *self.shape[2:])
            self._piece, self._filled = (part, np.zeros(held, self._dtype)), shard.start
        if part != self._piece[0] or columns.start != self._filled or columns.stop > shard.stop:
            raise ValueError(
                f"expected a block at columns {self._filled} … of at most "
                f"{self.shards[self._piece[0][2]].stop}, for rows {self._piece[0][:2]}; got "
                f"columns {columns.start} … {columns.stop} for rows {part[:2]}"
            )
        at = slice(columns.start - shard.start, columns.stop - shard.start)
        self._piece[1][:, at] = block.detach().cpu().numpy()
        self._filled = columns.stop
        if columns.stop == shard.stop:
            piece, self._piece = self._piece[1], None
            with self.telling():
                self._write(part, piece)

    def _write(self, part: Part, piece: np.ndarray) -> None:
        data = piece.reshape(-1).view(np.uint8).data
        whole = self._lines * self._line_bytes
        for path, offset, at in self._ranges(part):
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.put(path, offset, data[at], whole)
            disk.sync(path.parent)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        start, stop, shard = part
        record = {"rows": [start, stop], "shard": shard, "blake2b": digest}
        append_log(self._log, record)
        self._records[part] = digest
        self._covered.add(part)

    def _ranges(self, part: Part) -> Iterator[tuple[Path, int, slice]]:
        """Where a part lies: file, place in it, and which of the bytes of the part."""
        start, stop, shard = part
        rest = ["0"] * len(self.shape[2:])
        for row in range(start - start % self._lines, stop, self._lines):
            first, last = max(start, row), min(stop, row + self._lines)
            path = self.result.joinpath("values", "c", str(row // self._lines), str(shard), *rest)
            at = slice((first - start) * self._line_bytes, (last - start) * self._line_bytes)
            yield path, (first - row) * self._line_bytes, at

    def finish(self) -> None:
        """Give all of it the name `path`.

        Raises
        ------
        RuntimeError
            If parts are missing.
        FileExistsError
            If something has appeared at `path`; what was computed is kept.
        """
        found = sum(
            (stop - start) * (self.shards[at].stop - self.shards[at].start)
            for start, stop, at in self._covered
        )
        if found != self.shape[0] * self.shape[1] or self._piece is not None:
            raise RuntimeError(
                f"expected {self.shape[0] * self.shape[1]} pairs of rows; {found} were written"
            )
        with self.telling():
            for file in [*self.result.iterdir(), *(self.result / "values").iterdir(), self.result]:
                disk.sync(file)
        if self.path.exists():
            raise FileExistsError(f"{self.path} has appeared meanwhile: move it, and call again")
        with self.telling():
            os.rename(self.result, self.path)
            disk.sync(self.path.parent)
        self._finished = True

    def _verify(self) -> None:
        """Forget the parts that are not on disk as they were written."""
        for part, digest in list(self._records.items()):
            found = hashlib.blake2b(digest_size=16)
            for path, offset, at in self._ranges(part):
                if path.is_file():
                    with path.open("rb") as file:
                        file.seek(offset)
                        found.update(file.read(at.stop - at.start))
            if found.hexdigest() != digest:
                del self._records[part]
                shard = self.shards[part[2]]
                warnings.warn(
                    f"{self.partial}: test rows {part[0]} … {part[1] - 1} with training rows "
                    f"{shard.start} … {shard.stop - 1} do not have their checksum, and are "
                    "computed again",
                    stacklevel=2,
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]}…"
