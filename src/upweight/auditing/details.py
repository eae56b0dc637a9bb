"""Details of the most suspicious rows: cells that stand out, neighbours, rows behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.auditing.audit import RowDetail, StandOut
from upweight.auditing.evidence import Evidence, number
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps

__all__ = ["details_of"]

NEAREST = 3
CELLS = 8


def details_of(
    rows: pd.DataFrame,
    findings: pd.DataFrame,
    evidence: Evidence,
    settings: AuditSettings,
    steps: Steps,
) -> dict[int, RowDetail]:
    """Details of the rows of the gravest findings, and of the most suspicious rows.

    Half of the `top` rows go to each kind of finding at most, so that one does not crowd out the
    other.
    """
    chosen = _chosen(rows, findings, settings.top)
    places = evidence.place[np.array(chosen, dtype=np.intp)] if chosen else np.empty(0, np.intp)
    behind = _behind(evidence, places, settings, steps)
    return {
        row: _detail(row, int(place), number_of, evidence, behind)
        for number_of, (row, place) in enumerate(zip(chosen, places, strict=True))
    }


def _chosen(rows: pd.DataFrame, findings: pd.DataFrame, top: int) -> list[int]:
    judged = rows["suspicion"].notna().to_numpy()
    order = np.argsort(-rows["suspicion"].fillna(-1).to_numpy(), kind="stable")
    kinds = ("label", "features", "conflict", "harmful", "near-duplicate", "duplicate", "helpful")
    half = -(-top // 2)
    found: dict[int, None] = {}
    for share in (half, top):
        for kind in kinds:
            of_kind = findings.loc[findings["kind"] == kind, "row"].dropna().astype(int)
            for row in of_kind.iloc[:share]:
                if len(found) < top and judged[row]:
                    found[int(row)] = None
    for row in order:
        if len(found) >= top or not judged[row]:
            break
        found[int(row)] = None
    return sorted(found)


def _behind(
    evidence: Evidence, places: NDArray[np.intp], settings: AuditSettings, steps: Steps
) -> dict[str, NDArray[Any]]:
    if not settings.influence or not len(places):
        return {}

    def work() -> dict[str, NDArray[Any]]:
        from upweight.auditing.effects import what_is_behind
        from upweight.auditing.networks import CrossFit, Problem

        judged = evidence.judged
        problem = Problem.of(evidence.features.x, judged.y, judged.task)
        fit = CrossFit.of(judged.network)
        found = what_is_behind(problem, fit, places, seed=settings.seed, tell=steps.tell)
        return {"places": places, "rows": found.rows, "scores": found.scores, "cells": found.cells}

    return steps.run("details", work)


def _detail(
    row: int, place: int, number_of: int, evidence: Evidence, behind: dict[str, NDArray[Any]]
) -> RowDetail:
    judged = evidence.judged
    nearest = judged.indices[place]
    if judged.task == "classification":
        same = judged.y[nearest] == judged.y[place]
        supporting, contradicting = nearest[same], nearest[~same]
    else:
        off = np.abs(judged.y[nearest] - judged.y[place])
        usual = np.median(np.abs(judged.y - judged.blend.prediction)) * 1.4826
        supporting, contradicting = nearest[off <= 2 * usual], nearest[off > 2 * usual]
    at = evidence.rows
    pairs: list[tuple[int, float]] = []
    influences = None
    if behind:
        listed, scores = behind["rows"][number_of], behind["scores"][number_of]
        pairs = [(int(at[i]), float(v)) for i, v in zip(listed, scores, strict=True) if i >= 0]
        influences = behind["cells"][number_of]
    return RowDetail(
        row=row,
        stand_out=_stand_out(place, evidence, influences),
        supporting=[int(at[i]) for i in supporting[:NEAREST]],
        contradicting=[int(at[i]) for i in contradicting[:NEAREST]],
        behind=pairs,
    )


def _stand_out(
    place: int, evidence: Evidence, influences: NDArray[np.float64] | None
) -> list[StandOut]:
    """Cells by surprise; without numbers, by what they do to the held-out loss."""
    features, cells = evidence.features, evidence.cells
    frame = evidence.table.frame
    row = int(evidence.rows[place])
    by_column: dict[str, float] = {}
    if influences is not None:
        for j, value in enumerate(influences):
            name = features.columns[features.column[j]]
            if abs(value) > abs(by_column.get(name, 0.0)):
                by_column[name] = float(value)
    found: list[tuple[float, StandOut]] = []
    for j, name in enumerate(features.numeric_columns):
        value = features.numeric[place, j]
        if np.isnan(value):
            continue
        known = evidence.ascending[j]
        # equal numbers count half
        lower = np.searchsorted(known, value, "left") + np.searchsorted(known, value, "right")
        lower = lower / (2 * len(known))
        expected = number(cells.expected[place, j])
        shown = _shown(frame, name, row)
        cell = StandOut(name, shown, float(lower), expected, by_column.get(name))
        found.append((float(cells.surprise[place, j]), cell))
    numbers = set(features.numeric_columns)
    largest = max((abs(v) for v in by_column.values()), default=1.0) or 1.0
    for name in features.columns:
        if name not in numbers and name in by_column:
            weight = 3.0 * abs(by_column[name]) / largest
            cell = StandOut(name, _shown(frame, name, row), None, "", by_column[name])
            found.append((weight, cell))
    found.sort(key=lambda pair: -pair[0])
    return [cell for _, cell in found[:CELLS]]


def _shown(frame: pd.DataFrame, name: str, row: int) -> str:
    value = frame.iat[row, int(frame.columns.get_loc(name))]  # pyright: ignore[reportArgumentType]
    if isinstance(value, float | np.floating):
        return number(value)
    return str(value)
