"""What the commands of an audit print: for people, and as JSON."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from upweight.auditing.audit import Audit, FindingKind, RowDetail, Summary, Verification
from upweight.auditing.folder import Run
from upweight.auditing.plain import to_plain
from upweight.report.audit_text import a_number, counted, listed, share
from upweight.report.terminal import cut, escaped, printable, table, wrapped

__all__ = ["as_json", "audited", "findings", "plan", "row", "verified"]

FIRST = 10
#: Findings that are no fault, and so are not among the first.
NO_FAULT = ("helpful", "harmful", "no-target")
CELL = 24
#: Columns of `Audit.rows` that are shown in words.
WORDED = frozenset(
    {"row", "name", "suspicion", "label_flag", "given", "proposed", "feature_suspicion",
     "feature_flag", "suspect_column", "duplicate_of"}
)  # fmt: skip


# ---- audit --------------------------------------------------------------------------------------


def plan(found: Any, *, as_json: bool) -> str:
    """What was made of the columns, and what the audit will take."""
    if not as_json:
        return "\n".join(escaped(line) for line in str(found).splitlines())
    content = {
        "task": found.task,
        "columns": [to_plain(column) for column in found.columns],
        "steps": {name: float(seconds) for name, seconds in found.steps},
        "seconds": float(found.seconds),
        "memory": int(found.memory),
    }
    return _dumped(content)


def as_json(found: Audit, folder: Path, top: int) -> str:
    """The summary and the first findings."""
    content = {
        "run": str(folder),
        "report": str(folder / "report.html"),
        "summary": to_plain(found.summary),
        "findings": _records(found.findings.head(top)),
    }
    return _dumped(content)


def audited(audit: Audit, folder: Path, *, found: bool) -> str:
    """The first rows, what to expect of them, where the report is, and what comes next."""
    parts = [_head(audit.table.source.name, audit.settings.target, audit.summary)]
    if found:
        parts[0] += f"\nAlready in {folder}; --overwrite audits again."
    faults: Any = audit.findings[~audit.findings["kind"].isin(NO_FAULT)]
    if len(faults):
        parts.append(_listing(faults.head(FIRST)))
    parts.append("\n".join(_found(audit.summary)))
    where = shlex.quote(str(folder))
    suffix = "".join(Path(audit.table.source.name).suffixes[-2:]) or ".csv"
    stem = Path(audit.table.source.name).name.removesuffix(suffix) or "table"
    clean = shlex.quote(f"{stem}.clean{suffix}")
    following = [f"upweight show {where} --row {_first_row(faults)}"] if len(faults) else []
    if audit.summary.flagged:
        following += [
            f"upweight clean {where} -o {clean} --drop label-errors",
            f"upweight verify {where}",
        ]
    parts.append(f"report: {folder / 'report.html'}")
    if following:
        parts[-1] += "\nnext:   " + "\n        ".join(following)
    return "\n\n".join(parts)


def _head(name: str, target: str, summary: Summary) -> str:
    rows = counted(summary.rows, "row")
    if summary.judged < summary.rows:
        rows += f", {summary.judged:,} with a target"
    told = f"{printable(name)}: {rows}, {counted(summary.features, 'feature column')}, "
    told += f"target {printable(target)} ({summary.task}"
    if summary.classes:
        classes = [f"{printable(c)} {count:,}" for c, count in summary.classes.items()]
        told += f": {listed(classes, 6)}"
    return told + ")"


def _found(summary: Summary) -> list[str]:
    noun = "number" if summary.task == "regression" else "label"
    rate = summary.flagged / max(summary.judged, 1)
    line = f"{counted(summary.flagged, f'suspected wrong {noun}')} ({share(rate)} of the rows)"
    if summary.precision is not None and summary.flagged:
        middle, low, high = summary.precision
        line += (
            f"; {share(middle)} of them are expected to be wrong ({share(low)} to {share(high)})"
        )
    lines = [printable(line)]
    others = [
        f"{kind} {count:,}"
        for kind, count in summary.counts.items()
        if count and kind not in ("label", *NO_FAULT)
    ]
    if others:
        lines.append("other findings: " + ", ".join(others))
    return lines + [wrapped(f"note: {note}", indent=6) for note in summary.notes]


def _first_row(faults: Any) -> str:
    rows = faults["row"].dropna()
    return str(int(rows.iloc[0])) if len(rows) else "0"


# ---- show ---------------------------------------------------------------------------------------


def findings(run: Run, kind: str | None, top: int, *, as_json: bool) -> str:
    """The first findings, of one kind or of all that are faults."""
    kinds = get_args(FindingKind)
    if kind is not None and kind not in kinds:
        raise ValueError(f"expected a kind among {', '.join(kinds)}; got {kind!r}")
    every: Any = run.findings
    chosen = every[~every["kind"].isin(NO_FAULT)] if kind is None else every[every["kind"] == kind]
    shown = chosen.head(top)
    if as_json:
        return _dumped({"summary": to_plain(run.summary), "findings": _records(shown)})
    parts = [_head(run.source.name, run.settings.target, run.summary)]
    if len(shown):
        parts.append(_listing(shown))
        if len(chosen) > len(shown):
            parts.append(f"{len(chosen) - len(shown):,} more in {run.folder / 'findings.csv'}")
    else:
        parts.append("no findings" if kind is None else f"no findings of the kind {kind}")
    if kind is None:
        parts.append("\n".join(_found(run.summary)))
    return "\n\n".join(parts)


def row(run: Run, wanted: str, *, as_json: bool) -> str:
    """Everything that is known of a row, found by its name or position."""
    at = _position(run.rows, wanted)
    line: dict[Any, Any] = run.rows.iloc[[at]].to_dict("records")[0]
    about: Any = run.findings[run.findings["row"] == at]
    detail = run.details.get(at)
    if as_json:
        content = {
            "row": _records(run.rows.iloc[[at]])[0],
            "findings": _records(about),
            "detail": to_plain(detail) if detail else None,
        }
        return _dumped(content)
    parts = [_about(line, at)]
    told = [
        wrapped(f"{one['kind']}: {one['evidence']}", indent=2) for one in about.to_dict("records")
    ]
    parts.append("\n".join(told) if told else "no findings")
    if detail is not None:
        parts += _why(run, detail)
    elif told:
        parts.append(f"no details: only the {run.settings.top} most suspicious rows have them")
    signals = {name: value for name, value in line.items() if name not in WORDED}
    numbers = [f"{printable(k)} {_number(v)}" for k, v in signals.items() if not _missing(v)]
    if numbers:
        parts.append(wrapped("signals: " + ", ".join(numbers), indent=9))
    return "\n\n".join(parts)


def _position(rows: pd.DataFrame, wanted: str) -> int:
    """Of the row with this name; without one, this position."""
    named = np.flatnonzero((rows["name"].astype(str) == wanted).to_numpy())
    if len(named) > 1:
        raise ValueError(
            f"{len(named)} rows are named {wanted!r}: give the position of one, such as {named[0]}"
        )
    if len(named):
        return int(named[0])
    if wanted.isdecimal() and int(wanted) < len(rows):
        return int(wanted)
    raise ValueError(
        f"expected the name of a row, or a position from 0 to {len(rows) - 1}; got {wanted!r}"
    )


def _about(line: Mapping[Any, Any], at: int) -> str:
    name = "" if str(line["name"]) == str(at) else f" ({cut(line['name'], CELL)})"
    told = [f"row {at}{name}: given {_value(line['given'])}"]
    if not _missing(line["proposed"]):
        told.append(f"proposed {_value(line['proposed'])}")
    if not _missing(line["suspicion"]):
        told.append(f"suspicion {line['suspicion']:.3f}")
    if not _missing(line["suspect_column"]):
        told.append(f"suspect column {cut(line['suspect_column'], CELL)}")
    if not _missing(line["duplicate_of"]):
        told.append(f"the same as row {int(line['duplicate_of'])}")
    return ", ".join(told)


def _why(run: Run, detail: RowDetail) -> list[str]:
    parts: list[str] = []
    if detail.stand_out:
        cells = detail.stand_out
        columns: dict[str, list[object]] = {
            "column": [cut(one.column, CELL) for one in cells],
            "value": [cut(one.value, CELL) for one in cells],
            "lower in": ["" if one.rank is None else share(one.rank) for one in cells],
            "expected": [one.expected for one in cells],
        }
        parts.append("cells that stand out:\n" + table(columns, right=["lower in"]))
    for rows, what in (
        (detail.supporting, "nearest rows that support the given value"),
        (detail.contradicting, "nearest rows that contradict it"),
        ([at for at, _ in detail.behind], "training rows that speak most against it"),
    ):
        if rows:
            labels = [f"{at} ({_value(run.rows['given'].iloc[at])})" for at in rows]
            parts.append(f"{what}: {', '.join(labels)}")
    return parts


# ---- verify -------------------------------------------------------------------------------------


def verified(audit: Audit, *, as_json: bool) -> str:
    """Held-out scores with and without the flagged rows."""
    found = audit.verification
    assert found is not None
    if as_json:
        plain = {
            "metric": found.metric,
            "gain": to_plain(found.gain),
            "gain_over_random": to_plain(found.gain_over_random),
            "repeats": found.repeats,
            "held_out": found.held_out,
            "table": _records(found.table),
        }
        return _dumped(plain)
    shown: Any = found.table
    if "held_out" in shown:
        shown = shown[shown["held_out"] == shown["held_out"].iloc[0]]
    columns: dict[str, list[object]] = {
        "training rows": list(shown["what"]),
        "removed": [f"{count:,}" for count in shown["removed"]],
        found.metric: [f"{score:.4f}" for score in shown["score"]],
        "interval": [
            f"{low:.4f} to {high:.4f}"
            for low, high in zip(shown["low"], shown["high"], strict=True)
        ],
    }
    right = ["removed", found.metric]
    return "\n\n".join([table(columns, right=right), _gains(found), wrapped(f"({found.held_out})")])


def _gains(found: Verification) -> str:
    lines = [
        f"{what}: {middle:+.4f} ({low:+.4f} to {high:+.4f})"
        for what, (middle, low, high) in (
            ("gain without the flagged rows", found.gain),
            ("beside as many random rows    ", found.gain_over_random),
        )
    ]
    low, high = found.gain[1:]
    if low > 0 and found.gain_over_random[1] > 0:
        lines.append("Removing them helps, and more than removing random rows.")
    elif low > 0:
        lines.append(
            "Models get better without them, but not clearly more so than without random ones."
        )
    elif high < 0:
        lines.append("Removing them harms: correct or keep these rows.")
    else:
        lines.append("Whether removing them helps cannot be told from this.")
    return "\n".join(lines)


# ---- cells --------------------------------------------------------------------------------------


def _listing(shown: Any) -> str:
    lines = shown.to_dict("records")
    columns: dict[str, list[object]] = {
        "row": [_label(line) for line in lines],
        "finding": [line["kind"] for line in lines],
        "given → proposed": [_change(line) for line in lines],
        "score": [_number(line["score"]) for line in lines],
        "evidence": [line["evidence"] for line in lines],
    }
    return table(columns, right=["score"])


def _label(line: Mapping[Any, Any]) -> str:
    if _missing(line["row"]):
        return f"column {cut(line['column'], CELL)}"
    at = str(int(line["row"]))
    name = "" if _missing(line["name"]) else str(line["name"])
    return at if name in ("", at) else f"{at} ({cut(name, CELL)})"


def _change(line: Mapping[Any, Any]) -> str:
    if _missing(line["given"]):
        return ""
    given = _value(line["given"])
    return given if _missing(line["proposed"]) else f"{given} → {_value(line['proposed'])}"


def _value(value: object) -> str:
    if _missing(value):
        return "nothing"
    return a_number(value) if isinstance(value, float) else cut(value, CELL)


def _number(value: Any) -> str:
    if _missing(value):
        return ""
    return f"{float(value):.3g}" if isinstance(value, float) else printable(value)


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _records(frame: Any) -> list[dict[str, Any]]:
    return [
        {str(k): None if _missing(v) or v is pd.NaT else to_plain(v) for k, v in one.items()}
        for one in frame.to_dict("records")
    ]


def _dumped(content: object) -> str:
    return json.dumps(content, indent=2, allow_nan=False)
