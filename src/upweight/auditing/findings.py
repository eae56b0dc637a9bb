"""Findings: one line for everything that is wrong, the gravest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.auditing.audit import FindingKind
from upweight.auditing.evidence import Evidence, number, short
from upweight.auditing.leakage import Leak

__all__ = ["COLUMNS", "findings_of"]

COLUMNS = ("row", "name", "kind", "score", "given", "proposed", "column", "evidence")
EXTREME = 10  # rows that help or harm most

Line = dict[str, Any]


def findings_of(
    rows: pd.DataFrame,
    evidence: Evidence,
    leaks: Sequence[Leak],
    effects: Mapping[str, NDArray[Any]],
    *,
    coarse: bool,
) -> pd.DataFrame:
    """All findings of an audit.

    Parameters
    ----------
    rows
        `Audit.rows`.
    evidence
        What they rest on.
    leaks
        Columns that alone tell the target.
    effects
        ``influence`` of the judged rows, if it was computed.
    coarse
        Whether the features are too coarse to tell rows apart, so that twins say nothing.

    Returns
    -------
    DataFrame
        ``row``, ``name``, ``kind``, ``score``, ``given``, ``proposed``, ``column``, ``evidence``:
        by kind, and within a kind by score. The score is the suspicion of labels, the surprise in
        standard deviations of features, the influence of rows that help or harm, the held-out
        score of a column that leaks, and missing for twins.
    """
    lines = [*_leaks(leaks), *_labels(rows, evidence), *_features(rows, evidence)]
    if not coarse:
        lines += _twins(rows, evidence)
    if "influence" in effects:
        lines += _extremes(rows, evidence, effects["influence"])
    lines += _without_target(rows)
    table = pd.DataFrame(lines, columns=pd.Index(COLUMNS))
    for column in ("name", "kind", "given", "proposed", "column", "evidence"):
        table[column] = table[column].astype("string")
    table["row"] = table["row"].astype("Int64")
    table["score"] = table["score"].astype("float64")
    return table


def _line(rows: pd.DataFrame, row: int, kind: FindingKind, **more: Any) -> Line:
    given = rows["given"].iat[row]
    if isinstance(given, float):
        given = None if np.isnan(given) else number(given)
    return {"row": row, "name": rows["name"].iat[row], "kind": kind, "given": given, **more}


def _leaks(leaks: Sequence[Leak]) -> Iterator[Line]:
    for leak in leaks:
        yield {
            "row": pd.NA,
            "kind": "leakage",
            "score": leak.score,
            "column": leak.column,
            "evidence": f"a small tree predicts the target from {short(leak.column)} alone with a "
            f"held-out score of {leak.score:.3f}: was it known before the target?",
        }


def _flagged(rows: pd.DataFrame, flag: str, score: str) -> list[int]:
    """Positions of flagged rows, the highest score first."""
    chosen = np.flatnonzero(rows[flag].fillna(value=False).to_numpy(dtype=bool))
    values = rows[score].to_numpy()[chosen]
    return [int(row) for row in chosen[np.argsort(-values, kind="stable")]]


def _labels(rows: pd.DataFrame, evidence: Evidence) -> Iterator[Line]:
    for row in _flagged(rows, "label_flag", "suspicion"):
        proposed = rows["proposed"].iat[row]
        yield _line(
            rows,
            row,
            "label",
            score=rows["suspicion"].iat[row],
            proposed=number(proposed) if isinstance(proposed, float) else proposed,
            evidence=evidence.label(int(evidence.place[row])),
        )


def _features(rows: pd.DataFrame, evidence: Evidence) -> Iterator[Line]:
    for row in _flagged(rows, "feature_flag", "surprise"):
        yield _line(
            rows,
            row,
            "features",
            score=rows["surprise"].iat[row],
            column=rows["suspect_column"].iat[row],
            evidence=evidence.cell(int(evidence.place[row])),
        )


def _twins(rows: pd.DataFrame, evidence: Evidence) -> Iterator[Line]:
    kinds: dict[FindingKind, tuple[str, str]] = {
        "conflict": ("conflict_with", "the same cells as {}, which is {}"),
        "duplicate": ("duplicate_of", "the same cells and the same target as {}"),
        "near-duplicate": ("near_duplicate_of", "almost the same as {}, which is {}"),
    }
    for kind, (column, text) in kinds.items():
        other = rows[column].fillna(-1).to_numpy(dtype=np.int64)
        for row in np.flatnonzero(other >= 0):
            twin = int(other[row])
            if kind == "near-duplicate" and other[twin] == row and twin < row:
                continue  # told of the other one
            place = int(evidence.place[twin])
            target = short(evidence.given(place)) if place >= 0 else "without a target"
            yield _line(
                rows,
                int(row),
                kind,
                score=np.nan,
                evidence=text.format(evidence.name(twin), target),
            )


def _extremes(rows: pd.DataFrame, evidence: Evidence, influence: NDArray[Any]) -> Iterator[Line]:
    order = np.argsort(influence, kind="stable")
    count = min(EXTREME, len(order) // 10)
    usual = float(np.median(np.abs(influence))) or 1.0
    sides: tuple[tuple[FindingKind, NDArray[Any], int, str], ...] = (
        ("harmful", order[:count], -1, "raises"),
        ("helpful", order[::-1][:count], 1, "lowers"),
    )
    for kind, places, sign, verb in sides:
        for place in places:
            value = float(influence[place])
            if value * sign <= 0:
                break
            yield _line(
                rows,
                int(evidence.rows[place]),
                kind,
                score=value,
                evidence=f"as a training row it {verb} the mean loss of rows that the network has "
                f"not seen, {abs(value) / usual:.0f} times as much as rows usually move it",
            )


def _without_target(rows: pd.DataFrame) -> Iterator[Line]:
    for row in np.flatnonzero(rows["suspicion"].isna().to_numpy()):
        yield _line(
            rows,
            int(row),
            "no-target",
            score=np.nan,
            evidence="it has no target and was not judged",
        )
