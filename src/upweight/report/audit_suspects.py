"""The table of findings: which lines it has, what they say, and what they can be filtered by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from upweight.auditing.audit import Audit, RowDetail, StandOut
from upweight.report.audit_text import (
    cell_text,
    counted,
    cut,
    cut_middle,
    estimate_text,
    listed,
    name_text,
    visible,
)

__all__ = ["KINDS", "MOST_LINES", "Line", "Suspects", "as_position", "quotas", "row_names"]

MOST_LINES = 900
EVIDENCE = 300  # characters
CELL = 40  # characters of a name, a label or a value in a line
MOST_OPTIONS = 200

UNJUDGED = frozenset({"duplicate", "near-duplicate", "no-target"})

# By kind of finding: one of them, several of them.
KINDS: dict[str, tuple[str, str]] = {
    "label": ("wrong label", "wrong labels"),
    "features": ("odd cell", "odd cells"),
    "conflict": ("conflict", "conflicts"),
    "duplicate": ("duplicate", "duplicates"),
    "near-duplicate": ("near duplicate", "near duplicates"),
    "harmful": ("harms", "rows that harm"),
    "no-target": ("no target", "rows without a target"),
    "unflagged": ("not flagged", "rows not flagged"),
}


@dataclass(frozen=True)
class Line:
    """A finding about a row. `score` is in [0, 1], or NaN where there is none."""

    row: int
    kind: str
    column: str
    given: str
    proposed: str
    score: float
    evidence: str
    named: str = ""  # the column by its own name, which `column` makes fit for people


class Suspects:
    """The lines of the table, at most 900, every kind with its gravest.

    Parameters
    ----------
    audit
        What was found.
    names
        Of all rows, for people.
    most
        Lines at most.

    Attributes
    ----------
    lines
        In the order of `Audit.findings`; then the rows of `Audit.details` without any finding.
    total
        Findings about rows that could be shown, and rows without one, by kind.
    anchors
        Address within the page of each row that has a line.
    details
        `Audit.details`; and for as many rows again with an odd cell, what their finding says.
    """

    def __init__(self, audit: Audit, names: Sequence[str], most: int = MOST_LINES) -> None:
        self.audit, self.names = audit, names
        every = [*self._findings(), *self._unflagged()]
        self.total = Counter(line.kind for line in every)
        quota = quotas(self.total, most)
        self.lines: list[Line] = []
        for line in every:
            if quota[line.kind] > 0:
                quota[line.kind] -= 1
                self.lines.append(line)
        self.anchors = {line.row: f"row-{line.row}" for line in self.lines}
        odd = [line for line in self.lines if line.kind == "features"][: audit.settings.top]
        self.details = dict(audit.details)
        for line in odd:
            self.details[line.row] = _with_odd(self.details.get(line.row), line)

    def view(self) -> dict[str, Any]:
        """What the template needs, without the details and the shapes of columns."""
        heads = self._heads()
        given, proposed = self._class_positions("given"), self._class_positions("proposed")
        seen: set[int] = set()
        lines: list[dict[str, Any]] = []
        for i, line in enumerate(self.lines):
            first, known = line.row not in seen, line.row in self.details
            seen.add(line.row)
            lines.append(
                {
                    "row": line.row,
                    "id": self.anchors[line.row] if first else "",
                    "elsewhere": "" if first or not known else self.anchors[line.row],
                    "detailed": first and known,
                    "kind": line.kind,
                    "given_at": given[i],
                    "proposed_at": proposed[i],
                    "cells": [self._cell(str(head["key"]), line) for head in heads],
                    "evidence": line.evidence,
                }
            )
        shown = Counter(line.kind for line in self.lines)
        return {
            "heads": heads,
            "lines": lines,
            "kinds": [
                {"value": kind, "text": self.kind_name(kind, 2), "count": shown[kind]}
                for kind in KINDS
                if shown[kind]
            ],
            "given": _options(given, list(self.audit.summary.classes or {})),
            "proposed": _options(proposed, list(self.audit.summary.classes or {})),
            "told": f"{counted(len(lines), 'line')}, the gravest first.",
            "caption": self._caption(shown),
        }

    def kind_name(self, kind: str, number: int = 1) -> str:
        """A kind of finding for people."""
        one, more = KINDS.get(kind, (visible(kind), visible(kind)))
        name = one if number == 1 else more
        regression = self.audit.summary.task == "regression"
        return name.replace("label", "number") if regression and kind == "label" else name

    def evidence(self) -> dict[int, str]:
        """The evidence of the first line of each row."""
        return {line.row: line.evidence for line in reversed(self.lines)}

    def _findings(self) -> list[Line]:
        rows = self.audit.rows
        suspicion = rows["suspicion"].to_numpy(dtype=np.float64, na_value=np.nan)
        odd = rows["feature_suspicion"].to_numpy(dtype=np.float64, na_value=np.nan)
        lines: list[Line] = []
        for found in self.audit.findings.to_dict("records"):
            row, kind = as_position(found["row"]), str(found["kind"])
            if row is None or kind in ("helpful", "leakage"):
                continue
            # Which of the two suspicions a finding rests on; copies rest on neither.
            score = odd[row] if kind == "features" else suspicion[row]
            lines.append(
                Line(
                    row,
                    kind,
                    _text(found["column"]),
                    _text(found["given"]),
                    _estimate(found["proposed"]),
                    math.nan if kind in UNJUDGED else float(score),
                    _evidence(found["evidence"]),
                    "" if as_missing(found["column"]) else str(found["column"]),
                )
            )
        return lines

    def _unflagged(self) -> list[Line]:
        """Rows with details and without a finding: the most suspicious of those not flagged."""
        findings = self.audit.findings
        told = {as_position(row) for row in findings["row"]}
        rest = [row for row in self.audit.details if row not in told]
        rows = self.audit.rows.iloc[rest]
        ordered = rows.sort_values("suspicion", ascending=False, kind="stable")
        return [
            Line(
                int(row),
                "unflagged",
                "",
                _text(given),
                _estimate(proposed),
                float(score) if pd.notna(score) else math.nan,
                "One of the most suspicious rows, but not suspicious enough for a flag.",
            )
            for row, given, proposed, score in zip(
                *(ordered[name] for name in ("row", "given", "proposed", "suspicion")), strict=True
            )
        ]

    def _heads(self) -> list[dict[str, Any]]:
        named = any(self.names[line.row] != str(line.row) for line in self.lines)
        about = any(line.column for line in self.lines)
        heads = {
            "row": "row",
            **({"name": "name"} if named else {}),
            "kind": "finding",
            **({"column": "column"} if about else {}),
            "given": "given",
            "proposed": "proposed",
            "suspicion": "suspicion",
        }
        return [
            {"key": key, "text": text, "down": key == "suspicion"} for key, text in heads.items()
        ]

    def _cell(self, key: str, line: Line) -> dict[str, Any]:
        cell: dict[str, Any] = {"bar": None, "pill": "", "style": ""}
        if key == "suspicion":
            known = not math.isnan(line.score)
            bar = round(100 * min(max(line.score, 0.0), 1.0)) if known else 0
            return {**cell, "text": f"{line.score:.3f}" if known else "–", "bar": bar}
        if key == "kind":
            kind = line.kind if line.kind in KINDS else "other"
            return {**cell, "text": self.kind_name(line.kind), "pill": kind}
        texts = {
            "row": str(line.row),
            "name": cut_middle(self.names[line.row], CELL),
            "column": line.column,
            "given": line.given,
            "proposed": line.proposed,
        }
        return {**cell, "text": texts[key], "style": key if key in ("given", "proposed") else ""}

    def _class_positions(self, column: str) -> list[int | None]:
        """Position of the given or of the proposed class of each line's row, whatever was found."""
        classes = self.audit.summary.classes or {}
        position = {str(name): i for i, name in enumerate(classes)}
        values = self.audit.rows[column]
        return [position.get(str(values.iat[line.row])) for line in self.lines]

    def _caption(self, shown: Mapping[str, int]) -> str:
        told = (
            "One line per finding; a click opens the cells of the row beside those of its nearest "
            "rows. The most unusual cells come first there, striking ones on a tinted ground; a "
            "neighbour's cell is underlined where it clearly differs. Suspicion goes from 0 (fits) "
            "to 1 (wrong)."
        )
        missing = {kind: n - shown[kind] for kind, n in self.total.items() if n > shown[kind]}
        if missing:
            kinds = [f"{n:,} {self.kind_name(kind, n)}" for kind, n in missing.items()]
            told += (
                f" Not shown here: {listed(kinds, len(kinds))}, the least grave of their kind. All "
                "findings are in findings.csv, all rows in rows.parquet, beside this page."
            )
        return told


def _with_odd(detail: RowDetail | None, line: Line) -> RowDetail:
    """A row's details, with the cell that a finding is about."""
    found = detail or RowDetail(line.row)
    if not line.named or any(one.column == line.named for one in found.stand_out):
        return found
    cell = StandOut(line.named, line.given, expected=line.proposed)
    return replace(found, stand_out=[cell, *found.stand_out])


def as_missing(value: Any) -> bool:
    """Whether a value of a column is missing."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def as_position(value: Any) -> int | None:
    """A row's position, or None where it is missing."""
    return None if as_missing(value) else int(value)


def row_names(rows: pd.DataFrame) -> list[str]:
    """Names of the rows, fit for people."""
    return [
        str(i) if as_missing(name) else visible(name)
        for i, name in enumerate(rows["name"].tolist())
    ]  # fmt: skip


def _text(value: Any) -> str:
    return "" if as_missing(value) else cell_text(value, CELL)


def _estimate(value: Any) -> str:
    return "" if as_missing(value) else estimate_text(value, CELL)


def _evidence(value: Any) -> str:
    text = _text(value) if not isinstance(value, str) else visible(value[: EVIDENCE + 1])
    return cut(text, EVIDENCE)


def quotas(total: Mapping[str, int], most: int) -> dict[str, int]:
    """As many lines of each kind as fit: what small kinds leave over goes to the large ones."""
    quota: dict[str, int] = {}
    left = most
    for rank, (kind, count) in enumerate(sorted(total.items(), key=lambda pair: pair[1])):
        quota[kind] = min(count, left // (len(total) - rank))
        left -= quota[kind]
    return quota


def _options(positions: Sequence[int | None], classes: Sequence[Any]) -> list[dict[str, Any]]:
    counts = Counter(i for i in positions if i is not None)
    most = sorted(i for i, _ in counts.most_common(MOST_OPTIONS))
    return [{"value": i, "text": name_text(classes[i], CELL), "count": counts[i]} for i in most]
