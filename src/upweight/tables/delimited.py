"""Delimited text (CSV, TSV): the delimiter, the records, the columns."""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from upweight.tables.cells import NONE, blank_missing
from upweight.tables.errors import TableError, quoted
from upweight.tables.textfile import TextFile, open_bytes, open_text

pc: Any = pyarrow.compute  # its functions are made when it is imported

__all__ = [
    "Record",
    "find_delimiter",
    "header",
    "known_delimiter",
    "read_delimited",
    "records",
    "unique_names",
]

DELIMITERS = (",", ";", "\t", "|")
NAMES = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
BLOCK = 2**24
SNIFFED = 1000
PROBE = 64
EXACT = 2**53

# Arrow reads 0x10 as a number; 007 is one, but a code to whoever wrote it.
_CODE = r"^[+-]?0[0-9xX]"
_LONG = r"^[+-]?[0-9]{18,}$"
_COMMA = r"^[+-]?[0-9]*,[0-9]+$|^[+-]?[0-9]+$"


class Record(NamedTuple):
    """One record: its text with the end of its line, its cells, and the line where it begins."""

    raw: str
    cells: list[str]
    line: int
    closed: bool  # whether its last quote was closed


def records(lines: Iterable[str], delimiter: str) -> Iterator[Record]:
    """Records of delimited text; empty lines are none.

    A cell is quoted if it begins with a double quote, and may then hold delimiters, line breaks and
    doubled quotes, as in RFC 4180.
    """
    taken: list[str] = []
    ended = False

    def take() -> Iterator[str]:
        nonlocal ended
        for line in lines:
            taken.append(line)
            yield line
        ended = True

    largest = csv.field_size_limit(sys.maxsize)
    try:
        at = 1
        for cells in csv.reader(take(), delimiter=delimiter):
            if cells:
                # The reader asks for another line while a quote is open, and for none after it.
                yield Record("".join(taken), cells, at, not ended)
            at += len(taken)
            taken.clear()
    finally:
        csv.field_size_limit(largest)


def known_delimiter(given: str) -> str:
    r"""A delimiter as the user names it: one character, ``\t`` or a word such as ``tab``."""
    found = NAMES.get(given.lower(), given)
    if len(found) != 1 or found in '"\r\n' or not found.isascii():
        raise TableError(
            f"expected a delimiter of one character, such as ';' or 'tab'; got {quoted(given)}"
        )
    return found


def find_delimiter(file: TextFile, preferred: str = ",") -> str:
    """Comma, semicolon, tab or bar: the one for which most records are as long as the header."""

    def fit(delimiter: str) -> tuple[float, bool, int]:
        found = records(io.StringIO(file.sample, newline=""), delimiter)
        lengths = [len(record.cells) for record in itertools.islice(found, SNIFFED)]
        if file.cut and len(lengths) < SNIFFED:
            lengths = lengths[:-1] or lengths
        if not lengths or lengths[0] < 2:
            return 0.0, delimiter == preferred, 0
        return lengths.count(lengths[0]) / len(lengths), delimiter == preferred, lengths[0]

    return max(DELIMITERS, key=fit)


def header(file: TextFile, delimiter: str) -> tuple[list[str], int]:
    """The names of the columns, and how many records come before the first row of the table.

    Blanks around a name are removed; a column without one is named by its place, ``column 3``.
    """
    found = records(io.StringIO(file.sample, newline=""), delimiter)
    first = next(found, None)
    if first is None:
        raise TableError(f"{file.path} is empty: expected a line of column names, then the rows")
    if next(found, None) is None and not file.cut:
        raise TableError(f"{file.path} has a line of column names, but no rows")
    return unique_names([cell.strip() for cell in first.cells], str(file.path)), first.line


def unique_names(names: Sequence[str], where: str) -> list[str]:
    """Column names, those without one named by their place; no two may be the same."""
    named = [name or f"column {at}" for at, name in enumerate(names, start=1)]
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        numbers = sum(name.replace(".", "", 1).lstrip("-").isdigit() for name in names)
        hint = (
            "; does it lack a line with the names of the columns?"
            if numbers > len(names) / 2
            else "; rename all but one of them"
        )
        listed = ", ".join(quoted(name) for name in twice[:5])
        raise TableError(f"{where} has more than one column named {listed}{hint}")
    return named


def read_delimited(file: TextFile, delimiter: str) -> pd.DataFrame:
    """All columns: int64 or float64 where every cell is a number or missing, and else text.

    Raises
    ------
    TableError
        If rows are missing or have more or fewer cells than the header, or a quote stays open.
    """
    names, before = header(file, delimiter)
    if file.quotes % 2:
        _check_quotes(file, delimiter)
    builders = {name: _Builder(comma=delimiter == ";") for name in names}
    _fill(file, delimiter, names, before, builders)
    again = {name: _Builder(text=True) for name, b in builders.items() if b.changed}
    if again:
        _fill(file, delimiter, names, before, again)
        builders |= again
    return pd.DataFrame({name: builders.pop(name).finish() for name in names}, copy=False)


class _Builder:
    """Collects a column chunk by chunk, as numbers for as long as they are numbers."""

    def __init__(self, *, comma: bool = False, text: bool = False) -> None:
        self.comma = comma
        self.text = text
        self.changed = False  # numbers at first, text later: to be read again as text
        self.rows = 0
        self.chunks: list[Any] = []
        self.points: set[str] = set()

    def add(self, cells: Any) -> None:
        self.rows += len(cells)
        if self.changed:
            return
        if not self.text:
            numbers = _numbers(cells, self.comma, self.points)
            if numbers is not None and len(self.points) < 2:
                self.chunks.append(numbers)
                return
            self.text, self.changed = True, bool(self.chunks)
            self.chunks.clear()
        if not self.changed:
            missing = blank_missing(pc.utf8_trim_whitespace(cells)).is_null()
            self.chunks.append(pc.if_else(missing, pa.scalar(None, type=cells.type), cells))

    def finish(self) -> pd.Series:
        if self.text:
            column = pa.chunked_array(self.chunks, type=pa.string())
            return column.cast(pa.large_string()).to_pandas()
        whole = all(pa.types.is_integer(c.type) for c in self.chunks)
        missing = sum(c.null_count for c in self.chunks)
        if whole and missing and self._beyond_floats():
            return pa.chunked_array(self.chunks).cast(pa.large_string()).to_pandas()
        kind = np.int64 if whole and not missing else np.float64
        values = np.empty(self.rows, dtype=kind)
        at = 0
        while self.chunks:
            chunk = self.chunks.pop(0)
            values[at : at + len(chunk)] = chunk.to_numpy(zero_copy_only=False)
            at += len(chunk)
        return pd.Series(values, copy=False)

    def _beyond_floats(self) -> bool:
        """Whether integers would lose digits as floats, which a missing value makes of them."""
        chunks = (pc.drop_null(c) for c in self.chunks)
        return any(len(c) and abs(c.to_numpy()).max() > EXACT for c in chunks)


def _numbers(cells: Any, comma: bool, points: set[str]) -> Any | None:
    """int64 or float64 of a chunk of cells, or None if one is no number.

    Numbers with leading zeros, with thousands separators, or with more digits than a float has stay
    text. `points` collects which decimal points there are.
    """
    text = blank_missing(pc.utf8_trim_whitespace(cells), [NONE])
    if pc.any(pc.match_substring_regex(text, _CODE)).as_py():
        return None
    numbers = _cast(text, pa.int64())
    if numbers is not None:
        return numbers
    numbers = _cast(text, pa.float64())
    if numbers is None and comma and pc.all(pc.match_substring_regex(text, _COMMA)).as_py():
        points.add(",")
        return pc.cast(pc.replace_substring(text, ",", "."), pa.float64())
    if numbers is None:
        return None
    points.add(".")
    long = text.filter(pc.greater(pc.binary_length(text), 17))
    return None if pc.any(pc.match_substring_regex(long, _LONG)).as_py() else numbers


def _cast(text: Any, kind: Any) -> Any | None:
    """All cells as a type, or None."""
    try:
        # A cast of many cells that are none is slow: Arrow writes an error for each of them.
        for cells in (text[:PROBE], text):
            numbers = pc.cast(cells, kind)
    except pa.ArrowInvalid:
        return None
    return numbers


def _fill(
    file: TextFile,
    delimiter: str,
    names: Sequence[str],
    before: int,
    builders: dict[str, _Builder],
) -> None:
    """One pass over the file, into some of its columns."""
    with open_bytes(file.path) as stream:
        try:
            batches = pyarrow.csv.open_csv(
                stream if file.encoding.startswith("utf-8") else _transcoded(stream, file.encoding),
                pyarrow.csv.ReadOptions(
                    use_threads=False,
                    block_size=BLOCK,
                    column_names=list(names),
                    skip_rows_after_names=before,
                ),
                pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    include_columns=list(builders),
                    strings_can_be_null=False,
                ),
            )
            for batch in batches:
                for name, column in zip(builders, batch.columns, strict=True):
                    builders[name].add(column)
        except pa.ArrowInvalid as error:
            _check_records(file, delimiter, len(names))
            raise TableError(f"{file.path} cannot be read: {str(error).splitlines()[0]}") from error


def _transcoded(stream: Any, encoding: str) -> Any:
    return pa.transcoding_input_stream(pa.PythonFile(stream, mode="r"), encoding, "utf8")


def _check_quotes(file: TextFile, delimiter: str) -> None:
    with open_text(file.path, file.encoding) as lines:
        for record in records(lines, delimiter):
            if not record.closed:
                raise TableError(
                    f"{file.path} has a quote in line {record.line} that is never closed: "
                    f"{quoted(record.raw)}; close it, or double it if it belongs to the cell"
                )


def _check_records(file: TextFile, delimiter: str, expected: int) -> None:
    """Name the first record that does not have as many cells as the header."""
    with open_text(file.path, file.encoding) as lines:
        for record in records(lines, delimiter):
            found = len(record.cells)
            if found != expected:
                raise TableError(
                    f"{file.path} has {found} cells in line {record.line}, but its header has "
                    f"{expected}: {quoted(record.raw.rstrip())}; mend the line (quote a cell that "
                    f"holds the delimiter {delimiter!r}), or pass --delimiter if it is another"
                )
