"""Why a row is suspected: its cells beside those of its neighbours, and what each signal says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upweight.auditing.audit import Audit, RowDetail, StandOut
from upweight.report.audit_cells import Cells, ColumnCells
from upweight.report.audit_signals import MARKS, Signals, flags_of, verdict
from upweight.report.audit_text import (
    a_number,
    cell_text,
    counted,
    cut,
    cut_middle,
    estimate_text,
    name_text,
    share,
)
from upweight.report.page import template

__all__ = ["Details"]

MOST_CELLS = 60  # columns of a row that are shown, those that stand out first
MOST_NEIGHBOURS = 5  # of each kind
WIDE = 12  # columns, above which there are fewer of them
FEWER = 3
MOST_BEHIND = 5
END = 0.01  # of a column
SHORT = 24  # characters of a neighbour's cell


class Details:
    """Makes the details of single rows.

    Parameters
    ----------
    audit
        What was found.
    cells
        Columns to show.
    names
        Of all rows, for people.
    anchors
        Address within the page of the rows that have a line in the table of findings.
    """

    def __init__(
        self, audit: Audit, cells: Cells, names: Sequence[str], anchors: Mapping[int, str]
    ) -> None:
        self.audit, self.cells, self.names, self.anchors = audit, cells, names, anchors
        self.regression = audit.summary.task == "regression"
        self.signals = Signals(audit.rows, regression=self.regression)
        self.target = name_text(audit.settings.target)
        self._given = audit.rows["given"].tolist()
        flagged = audit.rows.loc[flags_of(audit.rows, "feature_flag"), ["row", "suspect_column"]]
        self._odd = {int(row): str(name) for row, name in flagged.to_numpy().tolist()}
        self._macros = template("audit.html.jinja").module

    def html(self, detail: RowDetail, evidence: str) -> str:
        """The ``<details>`` element of a row; its summary is the sentence of evidence."""
        return str(self._macros.detail(self._view(detail, evidence)))  # pyright: ignore[reportAttributeAccessIssue]

    def label(self, row: int) -> str:
        """The given label of a row, as text."""
        value = self._given[row]
        return cell_text(value, SHORT)

    def _view(self, detail: RowDetail, evidence: str) -> dict[str, Any]:
        row, readings = detail.row, self.signals.read(detail.row)
        most = FEWER if len(self.cells.columns) > WIDE else MOST_NEIGHBOURS
        same = [int(i) for i in detail.supporting[:most]]
        other = [int(i) for i in detail.contradicting[:most]]
        standing = {one.column: one for one in detail.stand_out}
        columns = self._ordered(standing)
        left_out = len(columns) - MOST_CELLS
        expects = any(one.expected for one in standing.values())
        drives = any(one.influence is not None for one in standing.values())
        noun = "number" if self.regression else "label"
        return {
            "row": row,
            "evidence": evidence,
            "verdict": verdict(readings, noun),
            "noun": noun,
            "target": self.target,
            "same": [self._head(i) for i in same],
            "other": [self._head(i) for i in other],
            "same_title": f"nearest rows, closest {self.target}"
            if self.regression
            else f"nearest rows that are also “{self.label(row)}”",
            "other_title": f"nearest rows, other {self.target}"
            if self.regression
            else "nearest rows with another label",
            "width": 3 + expects + drives,
            "expects": expects,
            "drives": drives,
            "cells": [
                self._label_line(row, [*same, *other]),
                *(
                    self._cell(column, row, standing.get(column.name), [*same, *other])
                    for column in columns[:MOST_CELLS]
                ),
            ],
            "note": f"{counted(left_out, 'more column')} not shown." if left_out > 0 else "",
            "behind": [
                {
                    "name": self._name(int(i)),
                    "href": self.anchors.get(int(i), ""),
                    "label": self.label(int(i)),
                    "influence": f"{value:+.3g}",
                }
                for i, value in detail.behind[:MOST_BEHIND]
            ],
            "behind_title": (
                f"Training rows that speak most against this {self.target}: their influence on the "
                "row's own loss; negative = it raises the loss of what the table says:"
            ),
            "readings": [
                {
                    "name": one.signal.name,
                    "says": one.says,
                    "mark": MARKS[one.says],
                    "value": a_number(one.value, 3),
                    "beats": "–" if one.beats is None else f"{share(one.beats)} of rows",
                    "meaning": one.signal.meaning,
                }
                for one in readings
            ],
        }

    def _ordered(self, standing: Mapping[str, StandOut]) -> list[ColumnCells]:
        """Columns, those that stand out first, in their order of rank."""
        known = self.cells.columns
        first = [known[name] for name in standing if name in known]
        return [*first, *(one for name, one in known.items() if name not in standing)]

    def _label_line(self, row: int, others: Sequence[int]) -> dict[str, Any]:
        given = str(self._given[row])
        return {
            "column": self.target,
            "value": self.label(row),
            "stands": False,
            "shape": "",
            "rank": "as given",
            "expected": "",
            "influence": "",
            "others": [
                (self.label(i), not self.regression and str(self._given[i]) != given)
                for i in others
            ],
        }

    def _cell(
        self, column: ColumnCells, row: int, standing: StandOut | None, others: Sequence[int]
    ) -> dict[str, Any]:
        at = column.at(row)
        influence = None if standing is None else standing.influence
        return {
            "column": name_text(column.name),
            "value": column.text(row),
            "stands": self._stands(column, row, standing),
            "shape": self.cells.shape_id(column.name) if at is not None and column.shape else "",
            "at": "" if at is None else f"{at:.3g}",
            "rank": column.told(row, None if standing is None else standing.rank),
            "expected": estimate_text(standing.expected, 60)
            if standing is not None and standing.expected
            else "",
            "influence": "" if influence is None else f"{influence:+.2g}",
            "others": [(cut(column.text(i), SHORT), column.differs(row, i)) for i in others],
        }

    def _stands(self, column: ColumnCells, row: int, standing: StandOut | None) -> bool:
        """Whether a cell is shown as striking: flagged, at an end of its column, or rare."""
        if column.name == self._odd.get(row):
            return True
        if standing is None:
            return False
        rank = column.rank(row) if standing.rank is None else standing.rank
        if rank is not None:
            return not END <= rank <= 1 - END
        return not column.is_missing(row) and column.share(row) < END

    def _head(self, row: int) -> dict[str, str]:
        return {"name": self._name(row), "href": self.anchors.get(row, "")}

    def _name(self, row: int) -> str:
        name = self.names[row]
        return f"row {row}" if name == str(row) else f"row {row} ({cut_middle(name, SHORT)})"
