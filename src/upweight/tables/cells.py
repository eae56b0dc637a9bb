"""Cells as text, numbers, dates and truth values.

Columns are first *encoded*: their distinct values as text, sorted, and a code for every row. What a
text means is then worked out once per distinct value, and does not depend on the order of rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made when it is imported

__all__ = [
    "MISSING",
    "NONE",
    "PARSES",
    "Encoded",
    "Parsed",
    "blank_missing",
    "encode",
    "has_leading_zeros",
    "natural",
    "parse_booleans",
    "parse_dates",
    "parse_numbers",
]

#: Cells of a text file that stand for a missing value, blanks around them aside.
MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "<NA>", "null", "NULL", "#N/A", "?")
#: Python's None is a fair name for a category ("None", "Small", "Large"), so it is missing only
#: among numbers, dates and truth values.
NONE = "None"

PARSES = 0.95  # the least share of cells that must be numbers or dates for the column to be
TRUE = {"yes": "no", "y": "n", "true": "false", "t": "f", "on": "off", "1": "0"}

_DATES = (
    *("%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y"),
    *("%d/%m/%y", "%m/%d/%y", "%d.%m.%y", "%d %b %Y", "%d-%b-%Y", "%d-%b-%y"),
    *("%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%Y-%m", "%Y%m%d"),
)
_TIMES = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
_ISO = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?\s?(Z|[+-]\d\d(:?\d\d)?)?)?"
_SAMPLE = 200

_THOUSANDS = r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?"
_COMMA = r"[+-]?(\d{1,3}(\.\d{3})+|\d*),\d+"
_CURRENCY = r"^\s*([+-]?)\s*[$€£¥]\s*|\s*[$€£¥%]\s*$"


@dataclass(frozen=True, eq=False)
class Encoded:
    """A column by its distinct values.

    Attributes
    ----------
    levels
        Distinct values as text, sorted; blanks around them are gone.
    codes
        (n,) the level of every row, −1 where the value is missing.
    counts
        Rows of each level.
    """

    levels: np.ndarray
    codes: np.ndarray
    counts: np.ndarray

    @property
    def present(self) -> int:
        """Rows that have a value."""
        return int(self.counts.sum())

    def spread(self, values: np.ndarray, missing: Any) -> np.ndarray:
        """One value per level → one per row, (n,)."""
        return np.append(values, np.asarray([missing], dtype=values.dtype))[self.codes]

    def sample(self, size: int) -> Encoded:
        """The levels of so many cells, evenly taken by rank; their codes are empty."""
        if len(self.levels) <= size:
            return self
        ends = np.cumsum(self.counts)
        cells = np.linspace(0, ends[-1] - 1, size).astype(np.int64)
        taken, counts = np.unique(np.searchsorted(ends, cells, side="right"), return_counts=True)
        return Encoded(self.levels[taken], np.empty(0, dtype=np.int64), counts)

    def first_row(self, levels: np.ndarray) -> int:
        """The first row that has one of some levels, given as a mask."""
        return int(np.flatnonzero(self.spread(levels, False))[0])


@dataclass(frozen=True, eq=False)
class Parsed:
    """What the levels of a column mean.

    Attributes
    ----------
    values
        float64, one per level; NaN where there is none.
    bad
        Levels that could not be read.
    share
        Of the cells with a value, those that could.
    how
        A remark on how they were read, or nothing.
    """

    values: np.ndarray
    bad: np.ndarray
    share: float
    how: str = ""


def encode(series: pd.Series) -> Encoded:
    """A column by its distinct values as text."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        inner = encode(pd.Series(series.cat.categories))
        codes = series.cat.codes.to_numpy()
        return _encoded(inner.levels, np.append(inner.codes, -1)[codes])
    if series.dtype.kind in "biufM" and isinstance(series.dtype, np.dtype):
        present = series.notna().to_numpy()
        values, inverse = np.unique(series.to_numpy()[present], return_inverse=True)
        codes = np.full(len(series), -1, dtype=np.int64)
        codes[present] = inverse
        levels = np.array(_texts_of(values), dtype=object)
        order = np.argsort(levels, kind="stable")
        return _encoded(levels[order], np.append(np.argsort(order), -1)[codes])
    text = blank_missing(pc.utf8_trim_whitespace(_text_array(series)))
    encoded = text.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    levels = np.array(encoded.dictionary.to_pylist(), dtype=object)
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    order = np.argsort(levels, kind="stable")
    return _encoded(levels[order], np.append(np.argsort(order), -1)[codes])


def blank_missing(text: Any, extra: Sequence[str] = ()) -> Any:
    """An Arrow array of trimmed texts, null where they stand for a missing value."""
    missing = pc.is_in(text, value_set=pa.array([*MISSING, *extra], type=text.type))
    return pc.if_else(missing, pa.scalar(None, type=text.type), text)


def parse_numbers(encoded: Encoded) -> Parsed:
    """Numbers, also with a percent or currency sign, thousands separators or a decimal comma.

    A comma separates thousands if each one is followed by groups of three digits in all cells that
    have one; otherwise it is the decimal point.
    """
    levels = pd.Series(encoded.levels, dtype=object)
    values = _floats(levels)
    bad = np.isnan(values) & (levels != NONE).to_numpy()
    how = ""
    if bad.any():
        rest: Any = levels[bad]
        rest = rest.str.replace(_CURRENCY, r"\1", regex=True)
        thousands = rest.str.fullmatch(_THOUSANDS).to_numpy(dtype=bool)
        comma = rest.str.fullmatch(_COMMA).to_numpy(dtype=bool)
        weight = encoded.counts[bad]
        if weight[thousands].sum() >= weight[comma].sum() > 0 or (thousands & ~comma).any():
            rest = rest.where(~thousands, rest.str.replace(",", "", regex=False))
            how = "the comma separates thousands"
        elif comma.any():
            plain = rest.str.replace(".", "", regex=False).str.replace(",", ".", regex=False)
            rest = rest.where(~comma, plain)
            how = "the comma is the decimal point"
        values[bad] = _floats(rest)
        bad &= np.isnan(values)
    return Parsed(values, bad, _share(encoded, ~np.isnan(values), bad), how)


def parse_dates(encoded: Encoded) -> Parsed:
    """Dates as days since 1970-01-01: ISO 8601, or the one of some usual formats that fits most.

    Where days and months cannot be told apart, because no day is above 12, days come first.
    """
    levels = pd.Series(encoded.levels, dtype=object)
    none = (levels == NONE).to_numpy()
    sample = pd.Series(encoded.sample(_SAMPLE).levels, dtype=object)
    best, how = np.full(len(levels), np.nan), ""
    if len(sample) and sample.str.fullmatch(_ISO).mean() >= 0.5:
        best, how = _days(levels, "ISO8601"), "as in ISO 8601"
    elif len(sample) and sample.str.contains(r"\d.*\d.*\d").mean() >= 0.5:
        fits = [
            (float(np.isfinite(_days(sample, day + time)).mean()), day + time)
            for day in _DATES
            for time in _TIMES
        ]
        top = max(share for share, _ in fits)
        likely = [form for share, form in fits if share == top and share >= 0.5]
        days = [_days(levels, form) for form in likely]
        shares = [_share(encoded, np.isfinite(d), ~np.isfinite(d) & ~none) for d in days]
        if days:
            at = int(np.argmax(shares))
            best, how = days[at], f"as in {likely[at]}"
            rival = likely[at].replace("%d", "%_").replace("%m", "%d").replace("%_", "%m")
            same = [s for s, form in zip(shares, likely, strict=True) if form == rival]
            if rival != likely[at] and same and same[0] == shares[at]:
                how += ", though months might come first"
    bad = np.isnan(best) & ~none
    return Parsed(best, bad, _share(encoded, np.isfinite(best), bad), how)


def parse_booleans(encoded: Encoded) -> Parsed | None:
    """1 and 0 for yes and no, true and false, y and n, t and f, on and off; None for others."""
    if len(encoded.levels) > 2 * 2**5 + 1:  # spellings of two words of at most 5 letters
        return None
    lower = [str(level).casefold() for level in encoded.levels if level != NONE]
    yes = next((yes for yes, no in TRUE.items() if set(lower) == {yes, no}), None)
    if yes is None:
        return None
    values = [np.nan if v == NONE else float(str(v).casefold() == yes) for v in encoded.levels]
    return Parsed(np.array(values), np.zeros(len(values), dtype=bool), 1.0)


def has_leading_zeros(levels: Iterable[str]) -> np.ndarray:
    """Which texts are numbers that begin with a zero: codes, such as postcodes."""
    pattern = re.compile(r"[+-]?0\d+")
    return np.array([pattern.fullmatch(level) is not None for level in levels], dtype=bool)


def natural(text: str) -> tuple[object, ...]:
    """A key that sorts numbers by size, and texts by alphabet with the numbers in them by size."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return (0, number, (), text)
    parts = [part for part in re.split(r"(\d+)", text) if part]
    key = tuple((0, int(p), "") if p.isdigit() else (1, 0, p.casefold()) for p in parts)
    return (1, 0.0, key, text)


def _encoded(levels: np.ndarray, codes: np.ndarray) -> Encoded:
    """Levels that occur, with their counts."""
    codes = codes.astype(np.int64, copy=False)
    counts = np.bincount(codes[codes >= 0], minlength=len(levels))
    if (counts == 0).any():
        kept = np.flatnonzero(counts)
        renumbered = np.full(len(levels) + 1, -1, dtype=np.int64)
        renumbered[kept] = np.arange(len(kept))
        levels, codes, counts = levels[kept], renumbered[codes], counts[kept]
    return Encoded(levels, codes, counts)


def _text_array(series: pd.Series) -> Any:
    """Arrow's large_string of any column, missing values as nulls."""
    try:
        array = pa.array(series, from_pandas=True)
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            return array.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        pass
    missing = series.isna().to_numpy()
    values = [None if gone else str(v) for v, gone in zip(series, missing, strict=True)]
    return pa.array(values, type=pa.large_string())


def _texts_of(values: np.ndarray) -> list[str]:
    if values.dtype.kind == "f":
        whole = bool(np.all(np.isfinite(values) & (np.floor(values) == values)))
        return [str(int(v)) if whole else repr(float(v)) for v in values]
    if values.dtype.kind == "M":
        texts = [str(v) for v in values.astype("datetime64[us]")]
        return [text.removesuffix("T00:00:00.000000") for text in texts]
    return [str(v) for v in values.tolist()]


def _floats(texts: pd.Series) -> np.ndarray:
    """NaN where a text is no number; ASCII digits only, no underscores."""
    plain = texts.str.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(?i:inf|infinity)")
    plain &= texts.map(str.isascii).astype(bool)
    values = np.full(len(texts), np.nan)
    mask = plain.to_numpy(dtype=bool)
    values[mask] = [float(text) for text in texts[mask]]
    return values


def _days(texts: pd.Series, form: str) -> np.ndarray:
    if form != "ISO8601":
        length = texts.str.len()
        texts = texts.where((length >= 6) & (length <= 40))
    stamps = pd.to_datetime(texts, format=form, errors="coerce", utc=True)
    values = stamps.to_numpy(dtype="datetime64[us]")
    days = values.astype(np.int64) / 86_400e6
    return np.where(np.isnat(values), np.nan, days)


def _share(encoded: Encoded, read: np.ndarray, bad: np.ndarray) -> float:
    """Cells that were read, of those that should be."""
    good, wrong = int(encoded.counts[read].sum()), int(encoded.counts[bad].sum())
    return good / (good + wrong) if good + wrong else 0.0
