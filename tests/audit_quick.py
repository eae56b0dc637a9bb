"""An audit in a tenth of a second, for tests of what happens around an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from upweight.auditing.audit import Audit, RowDetail, StandOut, Summary
from upweight.auditing.flagging import quick_suspicion
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.tables import Table, plan_columns, prepare, read_target, row_names

__all__ = ["WRONG", "frame", "quick_audit", "write_csv"]

WRONG = (4, 31, 50)  # rows of `frame` with the other label
CSV_HEAD = "id;size;weight;kind"


def frame(n: int = 80) -> pd.DataFrame:
    """Two kinds that are easy to tell, three labels that are wrong, and a copy of row 10."""
    rng = np.random.default_rng(3)
    kind = np.arange(n) % 2
    size = np.round(rng.normal(size=n) + 6 * kind, 2)
    weight = np.round(rng.normal(size=n) - 6 * kind, 3)
    label = np.where(kind == 1, "large", "small").astype(object)
    for row in WRONG:
        label[row] = "small" if label[row] == "large" else "large"
    table = pd.DataFrame({"size": size, "weight": weight, "kind": label})
    table.loc[12] = table.loc[10]
    table.insert(0, "id", [f"r{i:03d}" for i in range(n)])
    return table


def write_csv(path: Path, table: pd.DataFrame | None = None) -> Path:
    """Not as pandas would write it: semicolons, decimal commas, quotes, CRLF."""
    table = frame() if table is None else table
    lines = [CSV_HEAD]
    for line in table.itertuples(index=False):
        cells = [str(cell).replace(".", ",") for cell in line]
        lines.append(f'"{cells[0]}";{cells[1]};{cells[2]};{cells[3]}')
    path.write_bytes("\r\n".join([*lines, ""]).encode())
    return path


def quick_audit(table: Table, settings: AuditSettings, *, steps: Steps) -> Audit:
    """Flags by the forest and the neighbours; with the columns that an audit has."""
    columns = plan_columns(
        table.frame,
        target=settings.target,
        id=settings.id,
        kinds=settings.kinds,
        ignore=settings.ignore,
    )
    target = read_target(table.frame[settings.target], settings.task)
    features = prepare(table.frame, columns, seed=settings.seed)
    steps.run("features", lambda: {"x": features.x})
    kept = steps.run(
        "judge",
        lambda: {"suspicion": quick_suspicion(features.x, target.y, target.task, settings.seed)},
    )
    suspicion = kept["suspicion"] / 2
    flags = suspicion > 0.75
    rows = _rows(table, columns, target, suspicion, flags)
    found = _findings(rows)
    summary = Summary(
        rows=len(rows),
        judged=len(rows),
        task=target.task,
        features=len(features.columns),
        classes=None if target.classes is None else dict.fromkeys(target.classes, 1),
        counts={str(kind): int(count) for kind, count in found["kind"].value_counts().items()},
        flagged=int(flags.sum()),
        noise=0.04,
        seconds=dict(steps.seconds),
    )
    details = {
        row: RowDetail(row, [StandOut("size", "1", 0.5)], [0], [1], [(2, -0.1)])
        for row in map(int, rows.loc[flags, "row"])
    }
    return Audit(settings, table, columns, rows, found, summary, details)


def _rows(table: Table, columns: Any, target: Any, suspicion: Any, flags: Any) -> pd.DataFrame:
    n = len(table)
    classes = target.classes
    given = target.y if classes is None else np.array(classes, dtype=object)[target.y]
    other = target.y + 1.0 if classes is None else np.array(classes, dtype=object)[1 - target.y]
    copies = table.frame.drop(columns=[c.name for c in columns if c.kind == "id"])
    first = copies.groupby(list(copies.columns), sort=False).cumcount() > 0
    earlier = copies.reset_index().groupby(list(copies.columns), sort=False)["index"]
    return pd.DataFrame(
        {
            "row": np.arange(n),
            "name": row_names(table.frame, columns).astype("string"),
            "suspicion": suspicion,
            "label_flag": pd.array(flags, dtype="boolean"),
            "given": given,
            "proposed": np.where(flags, other, given),
            "feature_suspicion": np.zeros(n),
            "feature_flag": pd.array(np.arange(n) == 7, dtype="boolean"),
            "suspect_column": pd.array(
                ["size" if i == 7 else None for i in range(n)], dtype="string"
            ),
            "duplicate_of": earlier.transform("first").where(first).astype("Int64"),
            "knn": np.zeros(n),
        }
    )


def _findings(rows: pd.DataFrame) -> pd.DataFrame:
    lines = [
        {
            "row": line["row"],
            "name": line["name"],
            "kind": "label",
            "score": line["suspicion"],
            "given": line["given"],
            "proposed": line["proposed"],
            "column": None,
            "evidence": f"the trees prefer {line['proposed']}",
        }
        for line in rows[rows["label_flag"].fillna(False)].to_dict("records")
    ]
    lines += [
        {"row": row, "name": str(row), "kind": "duplicate", "score": 1.0, "evidence": "a copy"}
        for row in rows.loc[rows["duplicate_of"].notna(), "row"]
    ]
    lines.append({"row": 0, "name": "0", "kind": "helpful", "score": 1.0, "evidence": "helps"})
    columns = ["row", "name", "kind", "score", "given", "proposed", "column", "evidence"]
    found = pd.DataFrame(lines, columns=columns)
    return found.sort_values("score", ascending=False, kind="stable").astype({"row": "Int64"})
