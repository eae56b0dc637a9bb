"""What an audit does: the settings that replay it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from upweight.tables import Kind, Task

__all__ = ["AuditSettings"]


@dataclass(frozen=True)
class AuditSettings:
    """Settings of an audit; written to ``config.yaml`` of its run.

    Attributes
    ----------
    target
        Name of the column that the others should explain.
    task
        ``"classification"`` or ``"regression"``; None decides by the target's values.
    id
        Name of the column that names the rows.
    kinds
        What to make of single columns, where the guess is wrong.
    ignore
        Columns to leave out.
    delimiter, encoding
        Of a CSV file; None finds them.
    top
        How many rows get details in the report.
    seed
        Of everything random.
    folds
        No row is judged by a network that has seen it: rows are left out by so many folds.
    networks
        How many networks per fold, from different initial weights.
    trees
        In the forest whose out-of-bag trees judge a row; fewer above 50,000 rows, where each tree
        has not seen most of them, so that as many judge a row.
    neighbours
        K of the nearest neighbours that judge a row.
    influence
        Whether influences are computed: which rows harm, and which rows are behind a finding.
    planted
        How often faults are planted into the table, to see how many of them would be found.
    """

    target: str
    task: Task | None = None
    id: str | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict[str, Kind])
    ignore: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: str | None = None
    top: int = 100
    seed: int = 0
    folds: int = 5
    networks: int = 2
    trees: int = 300
    neighbours: int = 5
    influence: bool = True
    planted: int = 3
