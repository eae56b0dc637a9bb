"""What speaks for a finding, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.auditing.cells import Cells
from upweight.auditing.judging import VOTES, Judgement
from upweight.auditing.twins import Twins
from upweight.tables import Features, Table, Target, row_names

__all__ = ["Evidence", "number", "short"]

LONG = 60


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the rows of a table.

    Attributes
    ----------
    table, target
        Of all rows.
    features, judged, cells
        Of those with a target.
    rows
        Positions of these.
    twins
        Of all rows.
    names
        (n,) of all rows.
    """

    table: Table
    target: Target
    features: Features
    rows: NDArray[np.intp]
    judged: Judgement
    cells: Cells
    twins: Twins
    names: NDArray[Any]

    @cached_property
    def place(self) -> NDArray[np.intp]:
        """(n,) position of a row of the table among the judged rows, −1 for the others."""
        out = np.full(len(self.table.frame), -1, dtype=np.intp)
        out[self.rows] = np.arange(len(self.rows))
        return out

    @cached_property
    def ascending(self) -> list[NDArray[np.float64]]:
        """Known numbers of each numeric column, in ascending order."""
        columns = self.features.numeric.T
        return [np.sort(column[~np.isnan(column)]) for column in columns]

    def given(self, at: int) -> str:
        """Target of a judged row, as text."""
        value = self.judged.y[at]
        return number(value) if self.target.classes is None else self.target.classes[int(value)]

    def label(self, at: int) -> str:
        """Why the target of a judged row is probably wrong."""
        if self.target.classes is None:
            return self._of_number(at)
        classes, judged = self.target.classes, self.judged
        given, proposed = int(judged.y[at]), int(judged.blend.prediction[at].argmax())
        nearest = judged.y[judged.indices[at][:VOTES]]
        mine, theirs = int((nearest == given).sum()), int((nearest == proposed).sum())
        trees, network = judged.forest[at], judged.views["network"][at]
        worth = judged.knn_shapley[at]
        return (
            f"{_of(theirs, len(nearest))} of its nearest rows are {short(classes[proposed])}, "
            f"{_of(mine, None)} {short(classes[given])}; trees that have not seen it give "
            f"{short(classes[proposed])} {_share(trees[proposed])} and {short(classes[given])} "
            f"{_share(trees[given])}, networks {_share(network[proposed])} and "
            f"{_share(network[given])}"
            + ("; it misleads the prediction of its neighbours" if worth < 0 else "")
        )

    def _of_number(self, at: int) -> str:
        judged = self.judged
        views = judged.views
        near = judged.y[judged.indices[at][:VOTES]]
        return (
            f"trees and networks that have not seen it expect about "
            f"{number(views['forest'][at])} and {number(views['network'][at])}; its "
            f"{len(near)} nearest rows lie between {number(near.min())} and {number(near.max())}"
        )

    def cell(self, at: int) -> str:
        """Why a number of a judged row does not fit."""
        column = int(self.cells.column[at])
        value = self.features.numeric[at, column]
        expected, far = self.cells.expected[at, column], self.cells.surprise[at, column]
        text = (
            f"{short(self.features.numeric_columns[column])} is {number(value)}; the other columns "
            f"let expect about {number(expected)}, {far:.0f} standard deviations away"
        )
        more = np.flatnonzero(self.cells.surprise[at] > self.cells.threshold)
        others = [self.features.numeric_columns[j] for j in more if j != column]
        if others:
            text += (
                f"; {short(others[0])} stands out, too"
                if len(others) == 1
                else (f"; {len(others)} more columns stand out")
            )
        return text + _factor(value, expected)

    def name(self, row: int) -> str:
        """A row of the table in a sentence."""
        return (
            f"row {row}" if self.names[row] == str(row) else f"row {row} ({short(self.names[row])})"
        )


def _factor(value: float, expected: float) -> str:
    """A wrong unit shows as a power of ten."""
    if not (expected and value and np.isfinite(value / expected)) or value / expected <= 0:
        return ""
    power = np.log10(value / expected)
    nearest = round(power)
    if nearest == 0 or abs(power - nearest) > (0.1 if abs(nearest) == 1 else 0.25):
        return ""
    return f" (a factor of about {10.0**nearest:g}: another unit?)"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _of(count: int, total: int | None) -> str:
    if total is None:
        return "none" if count == 0 else str(count)
    return f"all {total}" if count == total else f"{count} of {total}"


def number(value: Any) -> str:
    """A number with four digits, without an exponent where that is short."""
    value = float(value)
    if not np.isfinite(value):
        return str(value)
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text


def short(text: object) -> str:
    """Text from data in a sentence: in quotes, not too long."""
    plain = str(text)
    return f"“{plain if len(plain) <= LONG else plain[: LONG - 1] + '…'}”"


def names_of(table: Table, columns: Any) -> NDArray[Any]:
    """(n,) names of the rows."""
    names: pd.Series = row_names(table.frame, columns)
    return names.to_numpy()
