"""The cells of an audited table: as text, and where each stands in its column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.report.audit_text import cell_text, share
from upweight.tables import Column, Kind
from upweight.tables.cells import encode, parse_dates, parse_numbers

__all__ = ["WIDTH", "Cells", "ColumnCells"]

WIDTH, HEIGHT = 64, 14  # of the shape of a column, in pixels
BINS = 32
TAIL = 0.01  # at each end of a column, left out of its shape; what lies there is marked at the end
MOST_CATEGORIES = 8
HIDDEN = frozenset({"target", "constant", "empty"})
APART = 0.25  # of the rows between two numbers: they are called different


@dataclass(frozen=True, eq=False)
class ColumnCells:
    """The cells of one column.

    Attributes
    ----------
    name
        Of the column.
    series
        Its cells.
    kind
        As in `Column`. Numbers and dates have ranks; others have frequencies.
    """

    name: str
    series: pd.Series = field(repr=False)
    kind: Kind

    @property
    def ordered(self) -> bool:
        """Whether the cells are numbers or dates."""
        return self.kind in ("numeric", "date")

    def text(self, row: int) -> str:
        """A cell as text."""
        return cell_text(self.series.iat[row])

    def is_missing(self, row: int) -> bool:
        """Whether a cell has no value."""
        return bool(self._missing[row])

    def rank(self, row: int) -> float | None:
        """Share of the other values that are lower, ties half; None where there is no order."""
        if not self.ordered:
            return None
        value, known = self._numbers[row], self._sorted
        if np.isnan(value) or len(known) < 2:
            return None
        low, high = np.searchsorted(known, value, "left"), np.searchsorted(known, value, "right")
        # The cell itself is among those that are the same.
        return (float(low) + (float(high - low) - 1) / 2) / (len(known) - 1)

    def differs(self, row: int, other: int) -> bool:
        """Whether two cells differ: numbers, if more than a quarter of the rows lie between.

        Texts and names, of which nearly all differ, never do.
        """
        if self.kind in ("text", "id"):
            return False
        if self.is_missing(row) or self.is_missing(other):
            return self.is_missing(row) != self.is_missing(other)
        first, second = self.rank(row), self.rank(other)
        if first is None or second is None:
            return self._codes[row] != self._codes[other]
        return abs(first - second) > APART

    def told(self, row: int, rank: float | None = None) -> str:
        """Where a cell stands, in words; a rank that is known already is taken."""
        if self.is_missing(row):
            return f"missing, as in {share(float(self._missing.mean()))}"
        rank = self.rank(row) if rank is None else rank
        if rank is not None:
            return share(min(max(rank, 0.0), 1.0))
        if self.ordered:
            return "no number"
        return (
            "only here" if self._counts[self._codes[row]] == 1 else f"in {share(self.share(row))}"
        )

    def share(self, row: int) -> float:
        """Share of the rows that have the same text; 0 where it is missing."""
        code = self._codes[row]
        return float(self._counts[code]) / len(self.series) if code >= 0 else 0.0

    def at(self, row: int) -> float | None:
        """Where a cell lies on the shape, in pixels from the left."""
        if self.is_missing(row):
            return None
        if not self.ordered:
            place = int(self._place[self._codes[row]])
            return (place + 0.5) * WIDTH / max(self._bars, 1)
        low, high = self._range
        value = self._numbers[row]
        if np.isnan(value):
            return None
        part = 0.5 if high == low else (float(np.clip(value, low, high)) - low) / (high - low)
        return 1 + part * (WIDTH - 2)

    @cached_property
    def shape(self) -> str:
        """The distribution as the path of an SVG: bars from the bottom, the highest to the top."""
        if self.ordered:
            known = self._sorted
            if not len(known):
                return ""
            low, high = self._range
            if high == low:
                return _bars(np.ones(1), WIDTH / 3, WIDTH / 3)
            inside = known[(known >= low) & (known <= high)]
            counts, _ = np.histogram(inside, bins=BINS, range=(low, high))
            return _bars(counts.astype(np.float64), 1, (WIDTH - 2) / BINS)
        if not self._bars:
            return ""
        heights = np.bincount(self._place, weights=self._counts, minlength=self._bars)
        return _bars(heights.astype(np.float64), 0, WIDTH / self._bars)

    @cached_property
    def _missing(self) -> NDArray[np.bool_]:
        return self._codes < 0 if not self.ordered else np.isnan(self._numbers)

    @cached_property
    def _numbers(self) -> NDArray[np.float64]:
        if pd.api.types.is_datetime64_any_dtype(self.series):
            values = self.series.astype("int64").to_numpy(dtype=np.float64).copy()
            values[self.series.isna().to_numpy()] = np.nan
            return values
        if pd.api.types.is_numeric_dtype(self.series):
            known = self.series.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            encoded = encode(self.series)
            parsed = (parse_dates if self.kind == "date" else parse_numbers)(encoded)
            known = encoded.spread(parsed.values, np.nan)
        return np.where(np.isfinite(known), known, np.nan)

    @cached_property
    def _sorted(self) -> NDArray[np.float64]:
        return np.sort(self._numbers[~np.isnan(self._numbers)])

    @cached_property
    def _range(self) -> tuple[float, float]:
        known = self._sorted
        low, high = known[int(TAIL * (len(known) - 1))], known[-1 - int(TAIL * (len(known) - 1))]
        return float(low), float(high)

    @cached_property
    def _codes(self) -> NDArray[np.int64]:
        return self._encoded[0]

    @cached_property
    def _counts(self) -> NDArray[np.float64]:
        return self._encoded[1]

    @cached_property
    def _encoded(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        encoded = encode(self.series)
        return encoded.codes, encoded.counts.astype(np.float64)

    @cached_property
    def _bars(self) -> int:
        return min(len(self._counts), MOST_CATEGORIES)

    @cached_property
    def _place(self) -> NDArray[np.int64]:
        """The bar of each category: the most frequent first, the last one for all the rest."""
        order = np.argsort(-self._counts, kind="stable")
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.minimum(np.arange(len(order)), MOST_CATEGORIES - 1)
        return place


class Cells:
    """The columns that rows are shown with: features first, then those that were left out.

    Parameters
    ----------
    frame
        `Table.frame`.
    columns
        What was made of them. The target, and columns without any or with one value, are not shown.
    """

    def __init__(self, frame: pd.DataFrame, columns: Sequence[Column]) -> None:
        shown = [column for column in columns if column.kind not in HIDDEN]
        cells: Any = frame
        shown.sort(key=lambda column: column.kind in ("id", "ignored"))
        self.columns: dict[str, ColumnCells] = {
            column.name: ColumnCells(column.name, cells[column.name], column.kind)
            for column in shown
        }
        self._index = {name: i for i, name in enumerate(self.columns)}

    def shape_id(self, name: str) -> str:
        """The address of the shape of a column within the page."""
        return f"shape-{self._index[name]}"


def _bars(heights: NDArray[np.float64], start: float, width: float) -> str:
    top = heights.max() if len(heights) else 0.0
    if top <= 0:
        return ""
    # A bar that is not empty can be seen.
    scaled = np.where(heights > 0, np.maximum(heights / top * HEIGHT, 0.8), 0.0)
    parts = [
        f"M{start + i * width:.4g} {HEIGHT}v{-height:.3g}h{width * 0.9:.3g}V{HEIGHT}z"
        for i, height in enumerate(scaled)
        if height > 0
    ]
    return "".join(parts)
