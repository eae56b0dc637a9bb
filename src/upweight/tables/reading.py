"""`read_table`: a table from a file or a frame, whatever its format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from upweight.tables.delimited import find_delimiter, known_delimiter, read_delimited
from upweight.tables.errors import TableError, quoted, told_error
from upweight.tables.frames import content_digest, from_frame
from upweight.tables.jsonlines import read_jsonlines
from upweight.tables.limits import size_limit
from upweight.tables.parquet import read_feather, read_parquet
from upweight.tables.textfile import TextFile, scan, sha256

__all__ = ["FileFormat", "Source", "Table", "TableError", "file_format", "read_table"]

FileFormat = Literal["csv", "parquet", "jsonl", "feather", "frame"]

SUFFIXES: dict[str, FileFormat] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".feather", ".arrow", ".ipc"), "feather"),
}


@dataclass(frozen=True)
class Source:
    """Where a table came from.

    Attributes
    ----------
    name
        Of the file, without its folder; ``"frame"`` for one in memory.
    path
        Of the file, as it was given; None for a frame.
    format
        ``"csv"`` (any delimited text), ``"parquet"``, ``"jsonl"``, ``"feather"`` or ``"frame"``.
    delimiter, encoding
        Of a text file, as given or found.
    digest
        SHA-256 of the bytes on disk; of a frame, of its names, types and cells.
    """

    name: str
    path: str | None
    format: FileFormat
    delimiter: str | None
    encoding: str | None
    digest: str


@dataclass(frozen=True, eq=False)
class Table:
    """A table and where it came from.

    Attributes
    ----------
    frame
        Its rows in their order, by position; columns have texts as names, and are int64 (or
        shorter), float64, bool, text, category or dates.
    source
        Where it came from.
    """

    frame: pd.DataFrame
    source: Source

    def __len__(self) -> int:
        return len(self.frame)


def read_table(
    source: Any,
    *,
    delimiter: str | None = None,
    encoding: str | None = None,
    limit: int | None = None,
) -> Table:
    r"""Read a table from a file, or take a frame as one.

    Parameters
    ----------
    source
        The path of a CSV, TSV or other delimited text file (``.csv``, ``.tsv``, ``.txt``), of JSON
        Lines (``.jsonl``, ``.ndjson``), each also with ``.gz`` behind it; of Parquet (``.parquet``)
        or Feather (``.feather``, ``.arrow``). Or a frame of pandas, polars or Arrow.
    delimiter
        Of delimited text, as a character, ``\t`` or a word such as ``tab``; None finds out
        whether it is ``,``, ``;``, tab or ``|``.
    encoding
        Of a text file; None finds it: by a byte order mark, else UTF-8 if the whole file is valid
        UTF-8, else by `charset_normalizer`.
    limit
        Bytes that the table may take once unpacked; default: half of the free memory, or the
        environment variable ``UPWEIGHT_TABLE_LIMIT`` (such as ``16GB``).

    Raises
    ------
    TableError
        If there is no such file, or no table in it, or it is damaged or too large. One line says
        what to do.

    Notes
    -----
    *Delimited text.* The first line names the columns. Cells that are empty, ``NA``, ``N/A``,
    ``n/a``, ``NaN``, ``nan``, ``<NA>``, ``null``, ``NULL``, ``#N/A`` or ``?`` are missing, blanks
    around them aside. ``None`` is missing among numbers, dates and truth values; among other texts
    it may well be the name of a category, and stays. A column of which every other cell is a number
    becomes int64 or float64, with a comma as the decimal point if the delimiter is ``;``. All else
    stays text, exactly as it is in the file: dates, truth values, numbers with leading zeros (they
    are codes), with thousands separators or with more digits than a float holds.

    *Other formats* declare types and missing values themselves. Lists and structs become their
    JSON, decimals and durations (in seconds) floats; a column of JSON Lines that mixes numbers and
    text is text. Infinite values stay.

    Examples
    --------
    >>> import pandas as pd
    >>> table = read_table(pd.DataFrame({"age": [31, 45], "label": ["yes", "no"]}))
    >>> table.frame
       age label
    0   31   yes
    1   45    no
    >>> table.source.format
    'frame'
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source), delimiter, encoding, size_limit(limit))
    frame = from_frame(source)
    _check_shape(frame, "the frame")
    origin = Source("frame", None, "frame", None, None, content_digest(frame))
    return Table(frame, origin)


def file_format(path: Path) -> FileFormat:
    """The format of a file by its name; `TableError` for others."""
    name = path.name.lower().removesuffix(".gz")
    found = SUFFIXES.get(Path(name).suffix)
    if found is None:
        raise TableError(
            f"{path} has an unknown suffix {quoted(path.suffix)}: expected "
            f"{', '.join(SUFFIXES)}; save the table as CSV or Parquet"
        )
    if path.name.lower().endswith(".gz") and found in ("parquet", "feather"):
        raise TableError(f"{path} should not be compressed again: {found} compresses by itself")
    return found


def text_file(
    path: Path, form: FileFormat, delimiter: str | None, encoding: str | None, limit: int
) -> tuple[TextFile, str | None]:
    """A text file read once, and its delimiter, as given or found; None for JSON Lines."""
    given = None if delimiter is None else known_delimiter(delimiter)
    file = scan(path, encoding, limit)
    if form == "jsonl":
        return file, None
    tabs = path.name.lower().removesuffix(".gz").endswith((".tsv", ".tab"))
    return file, given or find_delimiter(file, "\t" if tabs else ",")


def _read_file(path: Path, delimiter: str | None, encoding: str | None, limit: int) -> Table:
    check_file(path)
    form = file_format(path)
    try:
        if form in ("csv", "jsonl"):
            file, found = text_file(path, form, delimiter, encoding, limit)
            frame = read_jsonlines(file) if found is None else read_delimited(file, found)
            origin = Source(path.name, str(path), form, found, file.encoding, file.digest)
        else:
            frame = (read_parquet if form == "parquet" else read_feather)(path, limit)
            origin = Source(path.name, str(path), form, None, None, sha256(path))
    except OSError as error:
        raise TableError(f"{path} cannot be read: {told_error(error)}") from error
    _check_shape(frame, str(path))
    return Table(frame, origin)


def check_file(path: Path) -> None:
    """Refuse a path where there is no file."""
    if path.is_dir():
        raise TableError(f"{path} is a folder; expected a file, such as {path / 'table.csv'}")
    if not path.exists():
        near = f" in {path.parent}" if path.parent.is_dir() else f": no folder {path.parent} either"
        raise TableError(f"no file {path.name}{near}; check the name and the folder")
    if not path.is_file():
        raise TableError(f"{path} is no ordinary file, which can be read more than once")


def _check_shape(frame: pd.DataFrame, where: str) -> None:
    if frame.shape[1] == 0:
        raise TableError(f"{where} has no columns")
    if len(frame) == 0:
        raise TableError(f"{where} has columns, but no rows")
