"""`plan_columns`: what is made of each column of a table, and why."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from upweight.tables.cells import (
    NONE,
    PARSES,
    Encoded,
    Parsed,
    encode,
    has_leading_zeros,
    parse_booleans,
    parse_dates,
    parse_numbers,
)
from upweight.tables.encoders import messy
from upweight.tables.errors import TableError, quoted, unknown_column

__all__ = ["CHOICES", "MAX_LEVELS", "Column", "Kind", "plan_columns", "row_names"]

Kind = Literal[
    "numeric",
    "category",
    "boolean",
    "date",
    "text",
    "id",  # names the rows; at most one
    "constant",
    "empty",
    "ignored",
    "target",
]
#: Kinds that may be asked for.
CHOICES: tuple[Kind, ...] = ("numeric", "category", "boolean", "date", "text", "id", "ignored")

MAX_LEVELS = 30  # categories with a feature of their own
FEW_ROWS = 10  # below which distinct values prove nothing
LONG = 4  # words
SAMPLE = 1000  # cells that are looked at first, in columns of very many texts
PROMISING = 0.8

_ID_NAME = re.compile(r"(?:^|[_\-\s.])(?:id|uuid|guid|index)$", re.IGNORECASE)
_ID_CAMEL = re.compile(r"[a-z](?:Id|ID)$")


@dataclass(frozen=True)
class Column:
    """What is made of a column.

    Attributes
    ----------
    name
        Of the column.
    kind
        What it is taken for. ``"numeric"``, ``"category"``, ``"boolean"``, ``"date"`` and
        ``"text"`` become features; ``"id"`` names the rows.
    missing
        Rows without a value, those included whose cell could not be read.
    distinct
        Different values among the others.
    note
        Why, and how to override it.
    """

    name: str
    kind: Kind
    missing: int
    distinct: int
    note: str


def plan_columns(
    frame: pd.DataFrame,
    *,
    target: str,
    id: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    ignore: Collection[str] = (),
) -> list[Column]:
    """Say what each column is, in the order of the frame.

    Parameters
    ----------
    frame
        As `read_table` gives it.
    target
        The column that the others should explain.
    id
        The column that names the rows.
    kinds
        What single columns are, where the guess would be wrong: one of ``numeric``, ``category``,
        ``boolean``, ``date``, ``text``, ``id`` and ``ignored``.
    ignore
        Columns to leave out.

    Raises
    ------
    TableError
        If a column does not exist (the nearest name is proposed), is asked to be two things, or
        cannot be what it is asked to be.

    Notes
    -----
    The first rule that fits decides; blanks around a cell do not count.

    1. *empty*: no values. *constant*: a single value in all rows.
    2. *boolean*: two values that are yes/no, y/n, true/false, t/f, on/off or 1/0.
    3. *id*: as many values as rows, in at least 10 rows, which are integers in ascending or
       descending order, or texts without blanks; or which have a name such as ``id``,
       ``customer_id``, ``uuid`` or ``index``, unless they have decimals.
    4. *numeric*: numbers. Integer codes with few values are numeric, too. Text is if at least 95 %
       of the cells are numbers, percentages and amounts with a currency sign included, and
       fewer than 5 % have leading zeros; the other cells are missing.
    5. *date*: dates, or text of which at least 95 % are dates of one of the usual formats.
    6. *text*: more than 30 different texts that have blanks in at least half of the cells, and that
       repeat little (half as many texts as cells, or more) or are long (four words on average).
    7. *category*: all others.

    Examples
    --------
    >>> frame = pd.DataFrame({"age": [31, 45, 27, 31], "paid": ["yes", "no", "no", "yes"]})
    >>> for column in plan_columns(frame, target="paid"):
    ...     print(column.name, column.kind, column.distinct)
    age numeric 3
    paid target 2
    """
    asked = _asked(frame, target, id, dict(kinds or {}), ignore)
    series = [frame.iloc[:, at] for at in range(frame.shape[1])]
    columns = [_column(s, str(s.name), asked.get(str(s.name))) for s in series]
    return _one_name(columns, next((n for n, kind in asked.items() if kind == "id"), None))


def row_names(frame: pd.DataFrame, columns: Sequence[Column]) -> pd.Series:
    """Names of the rows: the texts of the id column; the position where there is none.

    Examples
    --------
    >>> frame = pd.DataFrame({"key": ["a", "b", None], "y": [0, 1, 0]})
    >>> row_names(frame, plan_columns(frame, target="y", id="key")).tolist()
    ['a', 'b', '2']
    """
    names = np.arange(len(frame)).astype(str).astype(object)
    first = next((column.name for column in columns if column.kind == "id"), None)
    if first is not None:
        encoded = encode(frame.iloc[:, frame.columns.get_loc(first)])
        present = encoded.codes >= 0
        names[present] = encoded.levels[encoded.codes[present]]
    return pd.Series(names, dtype=object)


def _asked(
    frame: pd.DataFrame,
    target: str,
    id: str | None,
    kinds: dict[str, Kind],
    ignore: Collection[str],
) -> dict[str, Kind]:
    """What the user says of columns, checked."""
    names = list(frame.columns)
    ignore = [ignore] if isinstance(ignore, str) else list(ignore)
    if target not in names:
        raise unknown_column(target, names, role="target column")
    for name in (*([id] if id is not None else []), *kinds, *ignore):
        if name not in names:
            raise unknown_column(name, names)
        if name == target:
            raise TableError(
                f"column {quoted(name)} is the target, and so cannot be an id, be ignored or be of "
                "another kind"
            )
    for name, kind in kinds.items():
        if kind not in CHOICES:
            raise TableError(
                f"column {quoted(name)} cannot be {quoted(kind)}; expected one of "
                f"{', '.join(CHOICES)}"
            )
    asked: dict[str, Kind] = {target: "target"}
    told: list[tuple[str, Kind]] = list(kinds.items())
    told.extend((name, "ignored") for name in ignore)
    told.extend([] if id is None else [(id, "id")])
    for name, kind in told:
        if asked.setdefault(name, kind) != kind:
            raise TableError(f"column {quoted(name)} is asked to be {asked[name]} and also {kind}")
    ids = [name for name, kind in asked.items() if kind == "id"]
    if len(ids) > 1:
        raise TableError(
            f"columns {quoted(ids[0])} and {quoted(ids[1])} are both asked to be an id, but only "
            "one can name the rows; let the other be ignored"
        )
    return asked


def _column(series: pd.Series, name: str, asked: Kind | None) -> Column:
    if asked == "ignored":
        return Column(name, asked, int(series.isna().sum()), int(series.nunique()), "as asked")
    if asked is None and _is_number(series):
        return _number(series, name)
    encoded = encode(series)
    missing = len(series) - encoded.present
    distinct = len(encoded.levels)
    if asked == "target":
        note = "what the other columns should explain"
        note += f"; the {missing} rows without it are not judged" if missing else ""
        return Column(name, asked, missing, distinct, note)
    if asked is not None:
        return _as_asked(name, asked, encoded, missing)
    if distinct == 0:
        return Column(name, "empty", missing, 0, "no values: left out")
    if distinct == 1 and missing == 0:
        return Column(name, "constant", 0, 1, f"always {quoted(encoded.levels[0])}: left out")
    kind, note, parsed = _guess(series, name, encoded)
    if parsed is not None:
        missing = len(series) - int(encoded.counts[~np.isnan(parsed.values)].sum())
        distinct = len(np.unique(parsed.values[~np.isnan(parsed.values)]))
        note += _told(parsed, encoded)
    return Column(name, kind, missing, distinct, note)


def _is_number(series: pd.Series) -> bool:
    return isinstance(series.dtype, np.dtype) and series.dtype.kind in "iuf"


def _number(series: pd.Series, name: str) -> Column:
    """A column of numbers, without a look at their texts."""
    present = series.to_numpy()[series.notna().to_numpy()]
    missing = len(series) - len(present)
    values = np.unique(present)
    distinct = len(values)
    if distinct == 0:
        return Column(name, "empty", missing, 0, "no values: left out")
    if distinct == 1 and missing == 0:
        return Column(name, "constant", 0, 1, f"always {values[0]}: left out")
    if distinct == 2 and values[0] == 0 and values[1] == 1:
        return Column(name, "boolean", missing, 2, f"0 and 1; {_override(name, 'category')}")
    if series.dtype.kind in "iu" and missing == 0 and distinct == len(series) >= FEW_ROWS:
        ordered = series.is_monotonic_increasing or series.is_monotonic_decreasing
        if ordered or _has_id_name(name):
            why = "integers in order" if ordered else "its name"
            return Column(name, "id", 0, distinct, _id_note(name, why))
    note = "numbers"
    if series.dtype.kind in "iu" and distinct <= MAX_LEVELS:
        note = f"integers with {distinct} values; if they are codes, {_override(name, 'category')}"
    elif _has_id_name(name) and series.dtype.kind in "iu":
        note = f"numbers, though with repeats in spite of its name; {_override(name, 'ignored')}"
    if series.dtype.kind == "f" and np.isinf(values).any():
        note += f"; {int(np.isinf(present).sum())} infinite"
    return Column(name, "numeric", missing, distinct, note)


def _as_asked(name: str, kind: Kind, encoded: Encoded, missing: int) -> Column:
    """A column that is what the user says, if it can be."""
    parsed = parse_as(kind, encoded)
    distinct = len(encoded.levels)
    note = "as asked"
    if kind == "boolean" and parsed is None:
        raise TableError(
            f"column {quoted(name)} cannot be boolean: it has {distinct} values, such as "
            f"{', '.join(quoted(level) for level in encoded.levels[:3])}; expected two, such as "
            "yes and no"
        )
    if parsed is not None and np.isnan(parsed.values).all():
        example = f", such as {quoted(encoded.levels[0])}" if distinct else ""
        raise TableError(
            f"column {quoted(name)} cannot be {kind}: none of its {distinct} values can be read as "
            f"one{example}"
        )
    if parsed is not None:
        read = ~np.isnan(parsed.values)
        missing += encoded.present - int(encoded.counts[read].sum())
        distinct = len(np.unique(parsed.values[read]))
        note += _told(parsed, encoded)
    if kind == "id":
        repeats = encoded.present - distinct
        note = "names the rows, as asked" + (f"; {repeats} names repeat" if repeats else "")
        note += f"; {missing} rows without one have their position" if missing else ""
    return Column(name, kind, missing, distinct, note)


def parse_as(kind: Kind, encoded: Encoded) -> Parsed | None:
    """The levels of a column as its kind has them; None for kinds that are not parsed."""
    if kind == "numeric":
        return parse_numbers(encoded)
    if kind == "date":
        return parse_dates(encoded)
    return parse_booleans(encoded) if kind == "boolean" else None


def _guess(series: pd.Series, name: str, encoded: Encoded) -> tuple[Kind, str, Parsed | None]:
    """The kind of a column of text, categories, truth values or dates."""
    category = _override(name, "category")
    booleans = parse_booleans(encoded)
    if booleans is not None:
        listed = " and ".join(quoted(level) for level in encoded.levels if level != NONE)
        return "boolean", f"only {listed}; {category}", booleans
    if isinstance(series.dtype, pd.CategoricalDtype):
        return "category", _category_note(name, encoded), None
    unique = len(encoded.levels) == len(series) >= FEW_ROWS
    if unique and _has_id_name(name):
        return "id", _id_note(name, "its name"), None
    zeros = int(encoded.counts[has_leading_zeros(encoded.levels)].sum())
    codes = zeros > (1 - PARSES) * encoded.present
    if not codes and parse_numbers(encoded.sample(SAMPLE)).share >= PROMISING:
        numbers = parse_numbers(encoded)
        if numbers.share >= PARSES:
            return "numeric", f"text that holds numbers; {category}", numbers
    dates = parse_dates(encoded)
    if dates.share >= PARSES:
        return "date", f"dates {dates.how}; {category}", dates
    blanks, words = _blanks(encoded)
    if unique and blanks == 0:
        return "id", _id_note(name, "each text occurs once"), None
    many = len(encoded.levels) > MAX_LEVELS and blanks >= 0.5
    if many and (len(encoded.levels) >= 0.5 * encoded.present or words >= LONG):
        return "text", f"{len(encoded.levels)} texts with blanks; {category}", None
    note = _category_note(name, encoded)
    return "category", note + ("; numbers with leading zeros are codes" if codes else ""), None


def _blanks(encoded: Encoded) -> tuple[float, float]:
    """Share of the cells that have blanks inside, and the mean number of words."""
    words = np.array([level.count(" ") + 1 for level in encoded.levels])
    present = max(1, encoded.present)
    share = float(encoded.counts[words > 1].sum()) / present
    return share, float(np.dot(words, encoded.counts)) / present


def _told(parsed: Parsed, encoded: Encoded) -> str:
    """How cells were read, and which could not be."""
    told = f"; {parsed.how}" if parsed.how and not parsed.how.startswith("as in") else ""
    bad = int(encoded.counts[parsed.bad].sum())
    if bad:
        row = encoded.first_row(parsed.bad)
        level = encoded.levels[encoded.codes[row]]
        cells = "cell" if bad == 1 else "cells"
        told += f"; {bad} unreadable {cells} count as missing, such as {quoted(level)} in row {row}"
    return told


def _category_note(name: str, encoded: Encoded) -> str:
    levels = len(encoded.levels)
    note = f"{levels} {'value' if levels == 1 else 'values'}"
    if messy(encoded, MAX_LEVELS):
        note += ", many of them rare: by their spelling if skrub is installed, else"
        note += f" the {MAX_LEVELS} commonest count singly"
    elif levels > MAX_LEVELS:
        note += f", of which the {MAX_LEVELS} commonest count singly"
    return f"{note}; {_override(name, 'text' if levels > MAX_LEVELS else 'ignored')}"


def _id_note(name: str, why: str) -> str:
    return f"names the rows ({why}), no feature; {_override(name, 'numeric')}"


def _override(name: str, kind: Kind) -> str:
    told = f"{name}={kind}"
    return f"otherwise --kind {shlex.quote(told) if told.isprintable() else repr(told)}"


def _has_id_name(name: str) -> bool:
    name = name.strip()
    return bool(_ID_NAME.search(name) or _ID_CAMEL.search(name))


def _one_name(columns: list[Column], id: str | None) -> list[Column]:
    """The column asked for names the rows, else the first that could; others are left out."""
    names = [column.name for column in columns if column.kind == "id"]
    chosen = id if id is not None else next(iter(names), None)
    note = f"could name the rows, as {quoted(chosen)} does; left out"
    return [
        replace(column, kind="ignored", note=f"{note}; {_override(column.name, 'numeric')}")
        if column.name in names and column.name != chosen
        else column
        for column in columns
    ]
