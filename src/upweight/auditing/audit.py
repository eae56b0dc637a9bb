"""`Audit`: what was found in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from upweight.auditing.settings import AuditSettings
from upweight.tables import Column, Table, Task

__all__ = [
    "Audit",
    "Expected",
    "FindingKind",
    "RowDetail",
    "StandOut",
    "Summary",
    "Verification",
]

FindingKind = Literal[
    "label",  # the given label (or number) is probably wrong
    "features",  # a cell, or the whole row, does not fit the others
    "duplicate",  # the same as an earlier row, label included
    "near-duplicate",  # almost the same as another row
    "conflict",  # the same features as another row, but another label
    "harmful",  # raises the loss on held-out rows most
    "helpful",  # lowers it most
    "leakage",  # a column (no row) that alone predicts the target
    "no-target",  # the target is missing: the row was not judged
]


@dataclass(frozen=True)
class Expected:
    """How many of the `k` most suspicious rows are truly wrong, as planted faults tell."""

    k: int
    wrong: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The audit in numbers.

    Attributes
    ----------
    rows, judged
        Rows of the table, and those with a target.
    task, classes
        What was predicted; the names of the classes and how many rows have each (None: regression).
    features
        Columns that were used.
    counts
        Findings by kind.
    flagged
        Rows with a label flag.
    noise
        Estimated share of wrong targets among the judged rows; None where it was not estimated.
    precision
        Expected share of truly wrong rows among those with a label flag, with an interval; None if
        no more rows are flagged than look wrong in clean tables.
    recall
        Share of planted wrong labels that got a flag.
    expected
        The same for the first k rows, for some k.
    quality
        Held-out score (accuracy, or R² in regression) of each judge: ``"network"``, ``"forest"``,
        ``"neighbours"``; and ``"baseline"``: of the commonest class (of the mean).
    planted
        ROC AUC of the suspicion, and of each judge alone, in telling planted wrong targets from the
        other rows.
    notes
        What a reader must know to believe or doubt this, in sentences.
    seconds
        Time by step.
    """

    rows: int
    judged: int
    task: Task
    features: int
    classes: Mapping[str, int] | None = None
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    flagged: int = 0
    noise: float | None = None
    precision: tuple[float, float, float] | None = None  # estimate, low, high
    recall: float | None = None
    expected: Sequence[Expected] = ()
    quality: Mapping[str, float] = field(default_factory=dict[str, float])
    planted: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class StandOut:
    """A cell that stands out from its column.

    Attributes
    ----------
    column
        Name.
    value
        As text.
    rank
        Share of the column's values that are lower, in [0, 1]; None for categories.
    expected
        What the other columns let expect, as text; empty where nothing is known.
    influence
        d(held-out loss) by this cell, in units per standard deviation; None if not computed.
    """

    column: str
    value: str
    rank: float | None = None
    expected: str = ""
    influence: float | None = None


@dataclass(frozen=True)
class RowDetail:
    """Why a row is suspected.

    Attributes
    ----------
    row
        Position in the table.
    stand_out
        Cells that stand out, the most striking first.
    supporting, contradicting
        Nearest rows with the same and with another label, nearest first (in regression: with the
        closest and with other targets).
    behind
        Training rows whose influence speaks most against the given label, with that influence on
        this row's held-out loss (negative = raises the loss of the given label).
    """

    row: int
    stand_out: Sequence[StandOut] = ()
    supporting: Sequence[int] = ()
    contradicting: Sequence[int] = ()
    behind: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Verification:
    """Held-out scores of models trained without the flagged rows, and without random ones.

    Attributes
    ----------
    metric
        Name of the score, higher is better.
    table
        ``what`` ("all rows", "without flagged", "without random", …), ``removed`` (rows), ``score``
        (mean), ``low``, ``high`` (interval of the mean over the repeats).
    gain
        Score without flagged minus score with all rows: estimate, low, high.
    gain_over_random
        The same minus that of random removals.
    repeats
        Seeds.
    held_out
        In words, on which rows the score was taken.
    """

    metric: str
    table: pd.DataFrame
    gain: tuple[float, float, float]
    gain_over_random: tuple[float, float, float]
    repeats: int
    held_out: str


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found in a table.

    Attributes
    ----------
    settings
        What was done.
    table
        What was audited. Row i of it is row i of everything else.
    columns
        What was made of each column of the table, in its order.
    rows
        A line per row of the table: ``row``, ``name``, ``suspicion`` in [0, 1], ``label_flag``,
        ``given``, ``proposed``, ``feature_suspicion`` in [0, 1], ``feature_flag``,
        ``suspect_column``, ``duplicate_of`` (an earlier row with the same cells), and the signals
        that went into them. Values of rows without a target are missing. Among the signals are four
        numbers of what a row is worth: ``influence`` (on the mean loss of left-out rows, negative =
        it harms), ``self_influence`` (on its own loss, large = learnt by heart), ``knn`` (the
        KNN-Shapley value, below 0 = it misleads its neighbours) and ``oob`` (the share of the given
        label among the trees that have not seen the row, a soft Data-OOB value; in regression minus
        the absolute error). The first two are there unless influence was switched off.
    findings
        A line per finding: ``row`` (missing if it is about a column), ``name``, ``kind``,
        ``score``, ``given``, ``proposed``, ``column``, ``evidence``; the gravest first.
    summary
        In numbers.
    details
        Of the most suspicious rows, by row.
    verification
        Whether removing the flagged rows helps; None before `verify`.
    """

    settings: AuditSettings
    table: Table
    columns: Sequence[Column]
    rows: pd.DataFrame
    findings: pd.DataFrame
    summary: Summary
    details: Mapping[int, RowDetail] = field(default_factory=dict[int, RowDetail])
    verification: Verification | None = None

    def suspects(self, k: int | None = None) -> pd.DataFrame:
        """The k rows of highest suspicion, highest first; default: all with a label flag."""
        order = self.rows.sort_values("suspicion", ascending=False, kind="stable")
        return order.loc[order["label_flag"].fillna(value=False)] if k is None else order.head(k)

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values, for JSON."""
        from dataclasses import asdict

        return asdict(self.summary)
