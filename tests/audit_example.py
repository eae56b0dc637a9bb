"""An `Audit` made by hand: random but seeded content, of any size, also with hostile text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from upweight.auditing.audit import (
    Audit,
    Expected,
    RowDetail,
    StandOut,
    Summary,
    Verification,
)
from upweight.auditing.settings import AuditSettings
from upweight.tables import Column, Source, Table

__all__ = ["HOSTILE", "example", "verified"]

SCRIPT = "</script><img src=x onerror=alert(1)>"
HOSTILE = [
    SCRIPT,
    "\"' onclick='alert(1)' x=\"",
    "]]><!-- {{ 7 * 7 }} {% raw %} --><!--detail 3-->",
    "</template></style></title></svg><script>document.title='owned'</script>",
    '=HYPERLINK("http://example.org/?x="&A1,"click")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\u202egnp.exe",
    "a\u2066b\u200bc\ufeffd",
    "tab\there\nnew line\rreturn\x1b[31mred\x07",
    "שלום עולם",
    "x" * 10_000,
    "constructor",
    "__proto__",
    "",
    " ",
    "&lt;b&gt; &amp; $x^2$ \\alpha",
    "🦆‍🔥 ﷽",
]


def example(
    rows: int = 400,
    *,
    seed: int = 0,
    task: str = "classification",
    hostile: bool = False,
    features: int = 6,
    top: int = 20,
    findings: int | None = None,
) -> Audit:
    """An audit of a table that never was.

    Parameters
    ----------
    hostile
        Whether all text, that of headers, classes, names and notes included, is hostile.
    features
        Numeric columns; there are four more, of other kinds.
    top
        Rows with details.
    findings
        How many label findings; default: a twentieth of the rows.
    """
    rng = np.random.default_rng(seed)
    word = _words(hostile)
    frame, columns, target = _table(rng, rows, features, word, task)
    labels = frame[target]
    wrong = np.sort(rng.permutation(rows)[: rows // 20 if findings is None else findings])
    odd = np.sort(rng.permutation(rows)[: max(rows // 40, 1)])
    table = _rows(rng, frame, columns, wrong, odd)
    counts = labels.value_counts(sort=False) if task == "classification" else None
    found = _findings(rng, table, columns, word)
    audit = Audit(
        settings=AuditSettings(target, id=frame.columns[0], seed=seed, top=top),
        table=Table(frame, Source(f"{word('churn')}.csv", None, "csv", ",", "utf-8", "ab" * 32)),
        columns=columns,
        rows=table,
        findings=found,
        summary=Summary(
            rows=rows,
            judged=int(table["suspicion"].notna().sum()),
            task=task,  # type: ignore[arg-type]
            features=features + 4,
            classes=None if counts is None else {str(k): int(n) for k, n in counts.items()},
            counts={str(k): int(n) for k, n in found["kind"].value_counts().items()},
            flagged=len(wrong),
            noise=0.048,
            precision=(0.84, 0.71, 0.93),
            recall=0.88,
            expected=[
                Expected(k, 0.9 * k**0.97, 0.8 * k**0.96, min(k, 0.98 * k**0.98))
                for k in (5, 10, 20, 50, 100)
                if k <= rows
            ],
            planted={"suspicion": 0.98, "network": 0.95, "forest": 0.97, "neighbours": 0.96},
            quality={"network": 0.86, "forest": 0.88, "neighbours": 0.83, "baseline": 0.58},
            notes=[
                f"Column {word('region')} has few values.",
                "Faults were planted at random; those in the table may be less random.",
            ],
            seconds={"read": 0.2, "network": 12.5, "forest": 1.1},
        ),
    )
    return replace(audit, details=_details(rng, audit, top))


def verified(audit: Audit, gain: float = 0.02, *, curve: bool = True) -> Audit:
    """The same audit after `verify`; without the curve there is one line per removal."""
    k = audit.summary.flagged
    lines = [("all rows", 0, 0.0), ("without flagged", k, gain), ("without random", k, -0.002)]
    if curve:
        lines += [("without most suspicious", round(k * f), gain * min(f, 1)) for f in (0.5, 1, 2)]
        lines += [("without random", round(k * f), -0.003 * f) for f in (0.5, 1, 2)]
        lines += [("without flagged by all rows", k, 2 * gain)]
    table = pd.DataFrame(
        [
            {
                "what": what,
                "removed": removed,
                "score": 0.81 + held + up,
                "low": 0.80 + held + up,
                "high": 0.82 + held + up,
                "held_out": where,
            }
            for where, held in (("all", 0.0), ("without a flag", 0.05))
            for what, removed, up in lines
        ]
    )
    found = Verification(
        "balanced accuracy",
        table,
        (gain, gain - 0.008, gain + 0.008),
        (gain + 0.002, gain - 0.007, gain + 0.011),
        10,
        "on a quarter of the rows, flagged ones included",
    )
    return replace(audit, verification=found)


def _words(hostile: bool) -> Any:
    """A function of a harmless word: itself, or one hostile text after the other, behind it."""
    if not hostile:
        return lambda text: text
    known: dict[str, str] = {}

    def word(text: str) -> str:
        return known.setdefault(text, f"{HOSTILE[len(known) % len(HOSTILE)]}")

    return word


def _table(
    rng: np.random.Generator, n: int, features: int, word: Any, task: str
) -> tuple[pd.DataFrame, list[Column], str]:
    classes = [word("no"), word("yes"), word("maybe")]
    numbers = rng.normal(size=(n, features)) * 10.0 ** rng.integers(-1, 4, features)
    data: dict[str, Any] = {word("customer"): [f"{word('c')}{i:05d}" for i in range(n)]}
    kinds = ["id"]
    for j in range(features):
        name = f"{word('measurement')}_{j}" if j else word("tenure")
        data[name] = np.round(numbers[:, j], 2)
        kinds.append("numeric")
    regions = [word(text) for text in ("north", "south", "east", "west")]
    data[word("region")] = rng.choice(regions, n, p=[0.6, 0.3, 0.07, 0.03])
    data[word("active")] = rng.random(n) < 0.7
    data[word("since")] = pd.Timestamp("2020-01-01") + pd.to_timedelta(
        rng.integers(0, 2000, n), "D"
    )
    data[word("comment")] = [
        f"{word('remark')} number {i}: " + "words " * int(rng.integers(1, 12)) for i in range(n)
    ]
    kinds += ["category", "boolean", "date", "text"]
    data[word("constant")] = 1
    kinds.append("constant")
    target = word("churned")
    if task == "regression":
        data[target] = np.round(100 + 20 * rng.normal(size=n), 1)
    else:
        data[target] = rng.choice(classes, n, p=[0.6, 0.35, 0.05])
    kinds.append("target")
    frame = pd.DataFrame(data)
    gaps = rng.random((n, features)) < 0.03
    frame.iloc[:, 1 : features + 1] = frame.iloc[:, 1 : features + 1].mask(gaps)
    columns = [
        Column(
            name,
            kind,  # type: ignore[arg-type]
            int(frame[name].isna().sum()),
            int(frame[name].nunique()),
            f"{kind}; otherwise --kind '{name}=category'",
        )
        for name, kind in zip(frame.columns, kinds, strict=True)
    ]
    return frame, columns, target


def _rows(
    rng: np.random.Generator,
    frame: pd.DataFrame,
    columns: list[Column],
    wrong: np.ndarray,
    odd: np.ndarray,
) -> pd.DataFrame:
    n = len(frame)
    labels = frame[next(column.name for column in columns if column.kind == "target")]
    flags, flagged = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    flags[wrong], flagged[odd] = True, True
    suspicion = np.where(flags, 1 - rng.beta(1, 12, n), rng.beta(1, 8, n) * 0.7)
    proposed = labels.copy()
    if labels.dtype.kind == "f":
        proposed = labels + np.where(flags, 60.0, 3.0) * rng.normal(size=n)
    else:
        classes = sorted(map(str, labels.unique()))
        proposed[flags] = [
            classes[(classes.index(str(label)) + 1) % len(classes)] for label in labels[flags]
        ]
    numeric = [column.name for column in columns if column.kind == "numeric"]
    away = np.where(flags, -1.0, 1.0)
    return pd.DataFrame(
        {
            "row": np.arange(n),
            "name": frame.iloc[:, 0].to_numpy(),
            "suspicion": suspicion,
            "label_flag": flags,
            "given": labels.to_numpy(),
            "proposed": proposed.to_numpy(),
            "feature_suspicion": np.where(flagged, 1 - rng.beta(1, 9, n), rng.beta(1, 9, n) * 0.7),
            "feature_flag": flagged,
            "suspect_column": np.where(flagged, rng.choice(numeric, n), None),
            "duplicate_of": pd.array([None] * n, dtype="Int64"),
            "knn": away * rng.gamma(2, 0.1, n) + rng.normal(size=n) * 0.05,
            "votes": np.clip(np.where(flags, 0.2, 0.8) + 0.2 * rng.normal(size=n), 0, 1),
            "oob": np.clip(np.where(flags, 0.1, 0.9) + 0.1 * rng.normal(size=n), 0, 1),
            "loss": np.where(flags, 3.0, 0.3) * rng.gamma(2, 0.5, n),
            "margin": away * rng.gamma(3, 0.5, n),
            "influence": 0.01 * away * rng.gamma(1, 1, n) + 0.008 * rng.normal(size=n),
            "self_influence": np.where(flags, 4.0, 0.5) * rng.gamma(1, 1, n),
            "disagreement": rng.gamma(1, 0.1, n),
            "surprise": np.where(flagged, 9.0, 1.0) * rng.gamma(5, 0.2, n),
        }
    )


def _findings(
    rng: np.random.Generator, rows: pd.DataFrame, columns: list[Column], word: Any
) -> pd.DataFrame:
    lines: list[dict[str, Any]] = []

    def add(row: int | None, kind: str, score: float, evidence: str, **more: Any) -> None:
        name = None if row is None else rows["name"].iat[row]
        lines.append({"row": row, "name": name, "kind": kind, "score": score, "given": None,
                      "proposed": None, "column": None, "evidence": evidence, **more})  # fmt: skip

    for row in np.flatnonzero(rows["label_flag"]):
        given, proposed = str(rows["given"].iat[row]), str(rows["proposed"].iat[row])
        add(int(row), "label", float(rows["suspicion"].iat[row]),
            f"raises the loss on {rng.integers(5, 60)} held-out rows; its five most similar rows "
            f"are all {proposed!r}", given=given, proposed=proposed)  # fmt: skip
    for row in np.flatnonzero(rows["feature_flag"]):
        column = rows["suspect_column"].iat[row]
        add(int(row), "features", float(rows["feature_suspicion"].iat[row]),
            f"{column} is 1000 times as large as the other columns let expect", column=column,
            given=str(rows["given"].iat[row]))  # fmt: skip
    lines.sort(key=lambda line: -line["score"])
    plain = np.flatnonzero(~rows["label_flag"] & ~rows["feature_flag"])[:40]
    for kind, some in (
        ("conflict", plain[:3]),
        ("duplicate", plain[3:9]),
        ("near-duplicate", plain[9:12]),
    ):
        for row in some:
            add(int(row), kind, 1.0, f"the same features as row {row + 1} ({word('no')})")
    for row in plain[12:18]:
        add(int(row), "harmful", -0.02, "raises the loss on 80 held-out rows")
    for row in plain[18:24]:
        add(int(row), "helpful", 0.02, "lowers the loss on 90 held-out rows")
    leaking = next(column.name for column in columns if column.kind == "date")
    add(None, "leakage", 0.97, "predicts the target alone in 97 % of the rows", column=leaking)
    return pd.DataFrame(lines).astype({"row": "Int64"})


def _details(rng: np.random.Generator, audit: Audit, top: int) -> dict[int, RowDetail]:
    frame, n = audit.table.frame, len(audit.rows)
    numeric = [column.name for column in audit.columns if column.kind == "numeric"]
    category = next(column.name for column in audit.columns if column.kind == "category")
    given = audit.rows["given"].to_numpy()
    details: dict[int, RowDetail] = {}
    for row in audit.suspects(min(top, n))["row"]:
        others = rng.permutation(np.setdiff1d(np.arange(n), [row]))[:200]
        same = [int(i) for i in others if given[i] == given[row]]
        rest = [int(i) for i in others if given[i] != given[row]]
        name = numeric[int(rng.integers(len(numeric)))]
        details[int(row)] = RowDetail(
            int(row),
            [
                StandOut(name, str(frame[name].iat[row]), 0.993, "4.2", 0.031),
                StandOut(
                    category, str(frame[category].iat[row]), None, str(frame[category].iat[0])
                ),
            ],
            same[:5],
            rest[:5],
            [(i, -float(value)) for i, value in zip(others[:5], rng.gamma(1, 1, 5), strict=True)],
        )
    return details
