"""`run_audit`: from a table to what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, r2_score

from upweight.auditing.audit import Audit, Summary
from upweight.auditing.cells import Cells, judge_cells
from upweight.auditing.details import details_of
from upweight.auditing.evidence import Evidence, names_of
from upweight.auditing.findings import findings_of
from upweight.auditing.judging import Judgement, judge
from upweight.auditing.leakage import Leak, find_leaks
from upweight.auditing.notes import notes_of
from upweight.auditing.plan import AuditPlan, plan_of
from upweight.auditing.planting import Calibration
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.auditing.twins import Twins, find_twins
from upweight.tables import (
    Column,
    Features,
    Table,
    TableError,
    Target,
    plan_columns,
    prepare,
    read_target,
)

__all__ = ["Prepared", "plan_audit", "prepared", "run_audit"]

FIRST = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
CLASS_FEATURES = 20  # more classes than this are no features for judging cells
COARSE = 0.5  # share of rows with twins from which twins say nothing


@dataclass(frozen=True, eq=False)
class Prepared:
    """A table as numbers.

    Attributes
    ----------
    columns
        What was made of each column.
    target
        Of all rows.
    features
        Of the rows that have a target.
    rows
        Positions of these.
    """

    columns: list[Column]
    target: Target
    features: Features
    rows: NDArray[np.intp]

    @property
    def y(self) -> NDArray[Any]:
        """Targets of the judged rows."""
        return self.target.y[self.rows]


def prepared(table: Table, settings: AuditSettings) -> Prepared:
    """Columns, target and features; all that is wrong with the input is refused here.

    Raises
    ------
    TableError
        See `plan_columns`, `read_target` and `prepare`; or if a setting does not make sense.
    """
    _check(settings)
    frame = table.frame
    columns = plan_columns(
        frame,
        target=settings.target,
        id=settings.id,
        kinds=settings.kinds,
        ignore=settings.ignore,
    )
    column: Any = frame[settings.target]
    target = read_target(column, settings.task)
    features = prepare(frame, columns, seed=settings.seed)
    rows = np.flatnonzero(target.judged)
    return Prepared(columns, target, features.take(rows), rows)


@dataclass(frozen=True, eq=False)
class _Found:
    ready: Prepared
    judged: Judgement
    calibration: Calibration | None
    cells: Cells
    twins: Twins
    leaks: Sequence[Leak]
    effects: dict[str, NDArray[Any]]


def _check(settings: AuditSettings) -> None:
    for name, least in {
        "top": 1, "seed": 0, "folds": 2, "networks": 1, "trees": 20, "neighbours": 1, "planted": 0
    }.items():  # fmt: skip
        value: Any = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise TableError(f"expected {name} as a whole number ≥ {least}; got {value!r}")


def plan_audit(table: Table, settings: AuditSettings) -> AuditPlan:
    """What an audit would do and take; raises what `run_audit` would raise of the input."""
    ready = prepared(table, settings)
    return plan_of(ready.columns, ready.target, ready.features, settings, len(table.frame))


def run_audit(table: Table, settings: AuditSettings, *, steps: Steps) -> Audit:
    """Judge every row of a table, find what is wrong, and say why.

    Parameters
    ----------
    table
        What to audit.
    settings
        How.
    steps
        Keeps what was computed, so that an interrupted audit goes on where it stopped.

    Raises
    ------
    TableError
        If the table cannot be audited; see `prepared`.
    """
    ready = prepared(table, settings)
    x, y, task = ready.features.x, ready.y, ready.target.task
    judged = judge(x, y, task, settings, steps)
    calibration = judged.calibration(FIRST) if len(judged.planted) else None
    cells = _cells(ready, steps)
    twins = find_twins(
        table.frame,
        ready.features.columns,
        ready.target.y,
        ready.target.judged,
        (judged.indices, judged.distances),
        tolerance=0.0 if task == "classification" else 0.1 * float(np.std(y)),
    )
    leaks = find_leaks(ready.features, y, task, seed=settings.seed)
    effects = _effects(ready, judged, settings, steps)
    all_of_it = _Found(ready, judged, calibration, cells, twins, leaks, effects)
    frame = _rows(table, all_of_it)
    evidence = Evidence(
        table,
        ready.target,
        ready.features,
        ready.rows,
        judged,
        cells,
        twins,
        frame["name"].to_numpy(),
    )
    findings = findings_of(frame, evidence, leaks, effects, coarse=twins.share > COARSE)
    details = details_of(frame, findings, evidence, settings, steps)
    summary = _summary(all_of_it, frame, findings, steps)
    return Audit(
        settings=settings,
        table=table,
        columns=ready.columns,
        rows=frame,
        findings=findings,
        summary=summary,
        details=details,
    )


def _cells(ready: Prepared, steps: Steps) -> Cells:
    features, y = ready.features, ready.y
    numbers = set(features.numeric_columns)
    own = np.array([name not in numbers for name in features.columns], dtype=bool)
    others = features.x[:, own[features.column]] if len(own) else features.x[:, :0]
    if ready.target.classes is None:
        spread = np.std(y) or 1.0
        target = np.clip((y - np.median(y)) / spread, -4, 4)[:, None]
    elif len(ready.target.classes) <= CLASS_FEATURES:
        target = np.eye(len(ready.target.classes), dtype=np.float32)[y][:, 1:]
    else:
        target = np.empty((len(y), 0))
    table = np.concatenate([others, target], axis=1)

    def work() -> dict[str, NDArray[Any]]:
        found = judge_cells(features.numeric, table)
        return {
            "surprise": found.surprise,
            "expected": found.expected,
            "row": found.row,
            "column": found.column,
            "threshold": np.array(found.threshold),
        }

    kept = steps.run("cells", work)
    return Cells(
        kept["surprise"], kept["expected"], kept["row"], kept["column"], float(kept["threshold"])
    )


def _effects(
    ready: Prepared, judged: Judgement, settings: AuditSettings, steps: Steps
) -> dict[str, NDArray[Any]]:
    if not settings.influence:
        return {}

    def work() -> dict[str, NDArray[Any]]:
        from upweight.auditing.effects import row_effects
        from upweight.auditing.networks import CrossFit, Problem

        problem = Problem.of(ready.features.x, ready.y, ready.target.task)
        found = row_effects(problem, CrossFit.of(judged.network), tell=steps.tell)
        return {"influence": found.influence, "self_influence": found.self_influence}

    return steps.run("influence", work)


def _rows(table: Table, found: _Found) -> pd.DataFrame:
    ready, judged, cells = found.ready, found.judged, found.cells
    twins, n, rows = found.twins, len(table.frame), ready.rows
    names = ready.features.numeric_columns
    suspect = np.array([*names, None], dtype=object)
    columns: dict[str, Any] = {
        "row": np.arange(n),
        "name": names_of(table, ready.columns),
        "suspicion": _spread(judged.suspicion, rows, n),
        "label_flag": _flags(judged.flags(found.calibration), rows, n),
        **_targets(ready, judged, n),
        "feature_suspicion": _spread(cells.suspicion, rows, n),
        "feature_flag": _flags(cells.flags, rows, n),
        "suspect_column": _texts(suspect[np.where(cells.row > 0, cells.column, -1)], rows, n),
    }
    for name in ("duplicate_of", "near_duplicate_of", "conflict_with"):
        values: NDArray[np.int64] = getattr(twins, name)
        columns[name] = pd.array(values, dtype="Int64")
        columns[name][values < 0] = pd.NA
    for name, values in {**_signals(judged, cells), **found.effects}.items():
        columns[name] = _spread(values, rows, n)
    return pd.DataFrame(columns)


def _signals(judged: Judgement, cells: Cells) -> dict[str, NDArray[Any]]:
    """See `Audit.rows`; the names are those of its columns."""
    at, y = np.arange(len(judged.y)), judged.y
    views = judged.views
    found: dict[str, NDArray[Any]] = {"knn": judged.knn_shapley}
    if judged.task == "classification":
        found["votes"], found["oob"] = views["neighbours"][at, y], views["forest"][at, y]
        network = views["network"]
        found["network"] = network[at, y]
        found["loss"] = -np.log(np.clip(network[at, y], 1e-6, 1))
        best = np.where(np.arange(network.shape[1]) == y[:, None], -1, network).max(axis=1)
        found["margin"] = network[at, y] - best
        spread = judged.network["prediction"]
        mean = spread.mean(axis=0)
        found["disagreement"] = 0.5 * np.abs(spread - mean).sum(axis=2).mean(axis=0)
    else:
        for name, view in {"votes": "neighbours", "oob": "forest"}.items():
            found[name] = -np.abs(y - views[view])
        found["loss"] = np.abs(y - views["network"])
        found["disagreement"] = judged.network["prediction"].std(axis=0)
    found["distance"] = judged.distances[:, :5].mean(axis=1)
    found["surprise"] = cells.row
    return found


def _targets(ready: Prepared, judged: Judgement, n: int) -> dict[str, Any]:
    rows, y = ready.rows, ready.y
    if ready.target.classes is None:
        return {
            "given": _spread(y, rows, n),
            "proposed": _spread(judged.blend.prediction, rows, n),
        }
    names = np.array(ready.target.classes, dtype=object)
    return {
        "given": _texts(names[y], rows, n),
        "proposed": _texts(names[judged.blend.prediction.argmax(axis=1)], rows, n),
    }


def _spread(values: NDArray[Any], rows: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    out = np.full(n, np.nan)
    out[rows] = values
    return out


def _flags(values: NDArray[np.bool_], rows: NDArray[np.intp], n: int) -> Any:
    out = pd.array(np.zeros(n, dtype=np.bool_), dtype="boolean")
    out[:] = pd.NA
    out[rows] = values
    return out


def _texts(values: NDArray[Any], rows: NDArray[np.intp], n: int) -> Any:
    out = np.full(n, None, dtype=object)
    out[rows] = values
    return pd.array(out, dtype="string")


def _summary(found: _Found, rows: pd.DataFrame, findings: pd.DataFrame, steps: Steps) -> Summary:
    ready, judged, calibration = found.ready, found.judged, found.calibration
    y, task, classes = ready.y, ready.target.task, ready.target.classes
    counts = findings["kind"].value_counts()
    quality = _quality(judged)
    flagged = int(np.sum(rows["label_flag"].fillna(value=False).to_numpy(dtype=bool)))
    named = None
    if classes is not None:
        sizes = np.bincount(y, minlength=len(classes))
        named = {name: int(size) for name, size in zip(classes, sizes, strict=True)}
    return Summary(
        rows=len(rows),
        judged=len(y),
        task=task,
        features=len(ready.features.columns),
        classes=named,
        counts={str(kind): int(count) for kind, count in counts.items()},
        flagged=flagged,
        noise=calibration.noise if calibration else None,
        precision=calibration.precision if calibration and flagged else None,
        recall=calibration.recall if calibration else None,
        expected=calibration.expected if calibration else (),
        quality=quality,
        planted=dict(judged.auc),
        notes=notes_of(
            ready.target,
            judged,
            quality=quality,
            flagged=flagged,
            precision=calibration.precision if calibration else (),
            coarse=found.twins.share > COARSE,
            leaks=found.leaks,
        ),
        seconds=dict(steps.seconds),
    )


def _quality(judged: Judgement) -> dict[str, float]:
    y = judged.y
    if judged.task == "regression":
        found = {name: float(r2_score(y, view)) for name, view in judged.views.items()}
        return {**found, "baseline": 0.0}
    found = {
        name: float(accuracy_score(y, view.argmax(axis=1))) for name, view in judged.views.items()
    }
    return {**found, "baseline": float(np.bincount(y).max() / len(y))}
