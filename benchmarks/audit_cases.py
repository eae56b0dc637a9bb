"""One data set and seed of `audit.py`: plant faults, audit, and see what was found.

Each function gives plain lines for the file of results. All of them audit the table as a user would
give it; what the faults are is only looked at afterwards.
"""

from __future__ import annotations

import time
from typing import Any

import audit_data
import numpy as np
import pandas as pd
import torch
from audit_data import CORRUPTIONS, DATA, TARGET

from upweight.auditing.audit import Audit

# The step of an audit that judges cells, alone: the others would take a hundred times as long.
from upweight.auditing.run import _cells, prepared, run_audit
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.evaluate import detection
from upweight.tables import read_table

RATES = (0.0, 0.05, 0.1, 0.2)
QUICK_RATES = (0.1,)
INFLUENCE = 0.1  # the rate at which influences are computed too: nothing else depends on them
SHARES = (0.05, 0.1)
QUICK_SPOILED = [("clean", 0.0), ("× 10", 0.05)]
TWINS = 0.03
# column of `Audit.rows`: whether its low values are suspicious
SIGNALS = {
    "oob": True,
    "network": True,
    "votes": True,
    "knn": True,
    "influence": True,
    "self_influence": False,
    "loss": False,
    "margin": True,
}
# What finds twins does not depend on these: they are at their cheapest.
NO_LABELS: dict[str, Any] = {
    "influence": False,
    "planted": 0,
    "networks": 1,
    "folds": 2,
    "trees": 20,
}

Line = dict[str, Any]
Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # features, given labels, which are wrong


def _audited(frame: pd.DataFrame, seed: int, **settings: Any) -> Audit:
    """With at most one row explained, which the figures do not need."""
    chosen = AuditSettings(TARGET, seed=seed, top=1, **settings)
    return run_audit(read_table(frame), chosen, steps=Steps())


def _share(part: Any, whole: Any) -> float | None:
    return None if not whole else float(part) / float(whole)


def caught(flags: np.ndarray, wrong: np.ndarray) -> Line:
    """Share of flagged rows, precision, recall and F1 of the flags."""
    hits = int((flags & wrong).sum())
    return {
        "flagged": float(flags.mean()),
        "precision": _share(hits, flags.sum()),
        "recall": _share(hits, wrong.sum()),
        "f1": _share(2 * hits, flags.sum() + wrong.sum()),
    }


def label_lines(name: str, seed: int, *, quick: bool = False) -> tuple[list[Line], list[Case]]:
    """Flipped labels: a line per rate, and the cases for peers."""
    frame = DATA[name](seed)
    assert frame is not None
    lines, cases = [], []
    for rate in QUICK_RATES if quick else RATES:
        spoiled, wrong = audit_data.flip(frame, rate, seed)
        start = time.perf_counter()
        found = _audited(spoiled, seed, influence=rate == INFLUENCE)
        seconds = time.perf_counter() - start
        ready = prepared(read_table(spoiled), found.settings)
        cases.append((ready.features.x, ready.y, wrong))
        flags = found.rows["label_flag"].to_numpy(dtype=bool)
        lines.append(
            {
                "set": name,
                "seed": seed,
                "rate": rate,
                "rows": len(frame),
                "wrong": int(wrong.sum()),
                "auc": _areas(found.rows, wrong),
                **caught(flags, wrong),
                "proposed_right": _proposed(found.rows, frame, flags & wrong),
                "noise": found.summary.noise,
                "expected": found.summary.precision[0] if found.summary.precision else None,
                **_first(found, wrong),
                "seconds": seconds,
            }
        )
    return lines, cases


def _areas(rows: pd.DataFrame, wrong: np.ndarray) -> dict[str, float]:
    if not wrong.any():
        return {}
    found = {"suspicion": detection(rows["suspicion"], wrong, low_is_suspicious=False).auc}
    for name, low in SIGNALS.items():
        if name in rows:
            found[name] = detection(rows[name], wrong, low_is_suspicious=low).auc
    return found


def _proposed(rows: pd.DataFrame, frame: pd.DataFrame, caught: np.ndarray) -> float | None:
    """Share of the flagged wrong rows for which the label before the flip was proposed."""
    right = rows["proposed"].astype(str).to_numpy() == frame[TARGET].astype(str).to_numpy()
    return _share(right[caught].sum(), caught.sum())


def _first(found: Audit, wrong: np.ndarray) -> Line:
    """Expected and true share of wrong rows among the k most suspicious.

    Of the k for which the audit says it (10, 20, 50, …), the one nearest to the number of wrong
    rows.
    """
    known, flipped = found.summary.expected, int(wrong.sum())
    if not known or not flipped:
        return {"first": None, "first_expected": None, "first_true": None}
    one = min(known, key=lambda one: abs(one.k - flipped))
    return {
        "first": one.k,
        "first_expected": one.wrong / one.k,
        "first_true": float(wrong[found.suspects(one.k)["row"]].mean()),
    }


def cell_lines(name: str, seed: int, *, quick: bool = False) -> list[Line]:
    """Spoiled cells of one numeric column: a line per kind and share, one of the clean table."""
    frame = DATA[name](seed)
    assert frame is not None
    lines = []
    spoiled_by = [("clean", 0.0), *((kind, share) for kind in CORRUPTIONS for share in SHARES)]
    for kind, share in QUICK_SPOILED if quick else spoiled_by:
        spoiled, changed, column = frame, np.zeros(len(frame), dtype=bool), ""
        if kind != "clean":
            spoiled, changed, column = audit_data.corrupt(frame, kind, share, seed)
            if not changed.any():
                continue
        ready = prepared(read_table(spoiled), AuditSettings(TARGET, seed=seed))
        cells = _cells(ready, Steps())
        flags, hits = cells.flags, cells.flags & changed
        right = np.array(ready.features.numeric_columns)[cells.column] == column
        line = {"set": name, "seed": seed, "kind": kind, "share": share, "column": column}
        line |= {"changed": int(changed.sum()), **caught(flags, changed)}
        if changed.any():
            own = cells.surprise[:, ready.features.numeric_columns.index(column)]
            line["auc"] = detection(cells.suspicion, changed, low_is_suspicious=False).auc
            line["auc_known"] = detection(own, changed, low_is_suspicious=False).auc
        lines.append(line | {"right_column": _share(right[hits].sum(), hits.sum())})
    return lines


def twin_lines(name: str, seed: int) -> list[Line]:
    """Planted copies of rows: recall of the copies, and precision among what is new.

    What the audit finds in the table before the copies is neither right nor wrong, and left out.
    """
    frame = DATA[name](seed)
    assert frame is not None
    more, planted = audit_data.add_twins(frame, TWINS, seed)
    before = _audited(frame, seed, **NO_LABELS).rows
    after = _audited(more, seed, **NO_LABELS).rows
    columns = {
        "exact": "duplicate_of",
        "conflict": "conflict_with",
        "near": "near_duplicate_of",
        "nearer": "near_duplicate_of",
    }
    lines = []
    for kind, column in columns.items():
        found = after[column].notna().to_numpy(dtype=bool)
        known = np.zeros(len(more), dtype=bool)
        known[: len(frame)] = before[column].notna()
        pairs = np.zeros(len(more), dtype=bool)
        for of in ("near", "nearer") if kind.startswith("near") else (kind,):
            pairs[np.concatenate(planted[of])] = True
        new = found & ~known
        lines.append(
            {
                "set": name,
                "seed": seed,
                "kind": kind,
                "planted": len(planted[kind][0]),
                "known": int(known.sum()),
                "recall": float(found[planted[kind][0]].mean()),
                "precision": _share((new & pairs).sum(), new.sum()),
            }
        )
    return lines


def work(task: tuple[str, str, int, bool]) -> tuple[list[Line], list[Case]]:
    """A part (labels, cells or twins), data set and seed, in a process of its own."""
    part, name, seed, quick = task
    torch.set_num_threads(1)
    if part == "labels":
        return label_lines(name, seed, quick=quick)
    return cell_lines(name, seed, quick=quick) if part == "cells" else twin_lines(name, seed), []
