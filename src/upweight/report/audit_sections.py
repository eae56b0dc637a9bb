"""The sections of the page of an audit that follow the findings."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from upweight.auditing.audit import Audit, Summary
from upweight.report.audit_signals import Signals
from upweight.report.audit_summary import flagged_columns
from upweight.report.audit_suspects import KINDS, as_position
from upweight.report.audit_text import a_number, counted, cut, cut_middle, name_text, share, visible
from upweight.report.audit_values import values_blocks
from upweight.report.page import Block, Format, Paragraph, Section, Table

__all__ = ["sections"]

MOST_COLUMNS = 300
MOST_COPIES = 100
MOST_EFFECTS = 10
NOTE = 300  # characters

COPIES = ("conflict", "duplicate", "near-duplicate")
JUDGES = {
    "network": ("network", "small neural networks, by cross-fitting"),
    "forest": ("forest", "extremely randomised trees, out of bag"),
    "neighbours": ("neighbours", "the nearest other rows"),
    "baseline": ("baseline", "no columns at all: the commonest class, or the mean"),
    "suspicion": ("all together", "the suspicion of this page"),
}


def sections(audit: Audit, names: Sequence[str]) -> list[Section]:
    """Columns, copies, leakage, effects, values, scores explained, quality, settings, notes."""
    found = [
        Section("What was made of each column", _columns(audit), "columns"),
        Section("Duplicates and conflicts", _copies(audit, names), "copies"),
        Section("Columns that may leak the target", _leakage(audit), "leakage"),
        Section("Rows that help or harm most", _effects(audit, names), "effects"),
        Section("Influence and data values side by side", values_blocks(audit, names), "values"),
        Section("How the scores came about", _scores(audit), "scores"),
        Section("How good the judges are", _model(audit), "model"),
        Section("Settings and replay", _settings(audit), "settings"),
    ]
    if audit.summary.notes:
        notes: list[Block] = [Paragraph(visible(note)) for note in audit.summary.notes]
        found.append(Section("Notes", notes, "notes"))
    return found


def _columns(audit: Audit) -> list[Block]:
    odd, n = flagged_columns(audit), max(audit.summary.rows, 1)
    lines: list[Any] = [
        (
            name_text(column.name),
            column.kind,
            share(column.missing / n) if column.missing else "none",
            column.distinct,
            odd.get(name_text(column.name), 0),
            cut(visible(column.note), NOTE),
        )
        for column in audit.columns[:MOST_COLUMNS]
    ]
    heads = ["column", "taken for", "missing", "distinct", "odd cells", "why, and how to override"]
    blocks: list[Block] = [
        Paragraph(
            "If a column was misunderstood, everything that follows from it is doubtful: say what "
            "it is, as its line tells, and audit again."
        ),
        Table(
            pd.DataFrame(lines, columns=heads),
            f"{counted(len(audit.columns), 'column')} of the table, in their order."
            + _first(len(lines), len(audit.columns), "all are in columns.json beside this page"),
            {"distinct": "{:,}", "odd cells": "{:,}"},
            whole=True,
        ),
    ]
    return blocks


def _first(shown: int, total: int, where: str = "") -> str:
    """That a table has only the first lines, and where all of them are."""
    if shown >= total:
        return ""
    return f" The first {shown:,} of {total:,} are shown{'; ' + where if where else ''}."


def _copies(audit: Audit, names: Sequence[str]) -> list[Block]:
    found: Any = audit.findings[audit.findings["kind"].isin(COPIES)]
    if found.empty:
        return [Paragraph("No row is the same as another one, or almost.")]
    return [
        Paragraph(
            "Copies count double in every average, and make a model look better than it is when "
            "one of them is trained on and the other held out. Rows in conflict have the same "
            "features and another target: at least one of them is wrong, or a column is missing "
            "that tells them apart."
        ),
        _findings(found, names, MOST_COPIES, "Copies, conflicts first."),
    ]


def _findings(
    found: pd.DataFrame, names: Sequence[str], most: int, caption: str, score: str = ""
) -> Table:
    places = {kind: i for i, kind in enumerate(KINDS)}
    order = np.argsort([places.get(kind, len(KINDS)) for kind in found["kind"]], kind="stable")
    shown: Any = found.iloc[order[:most]]
    rows = [as_position(row) for row in shown["row"]]
    frame = pd.DataFrame(
        {
            "row": ["–" if row is None else str(row) for row in rows],
            "name": ["–" if row is None else cut_middle(names[row], 60) for row in rows],
            "kind": [KINDS.get(kind, (kind,))[0] for kind in shown["kind"]],
            "evidence": [cut(visible(text), NOTE) for text in shown["evidence"]],
        }
    )
    if score:
        frame.insert(3, score, shown["score"].to_numpy(dtype=np.float64, na_value=np.nan))
    if frame["row"].tolist() == frame["name"].tolist():
        frame = frame.drop(columns="name")
    if len(set(shown["kind"])) == 1:
        frame = frame.drop(columns="kind")
    where = "all are in findings.csv beside this page"
    formats: dict[Hashable, Format] = {score: "{:+.3g}"} if score else {}
    return Table(frame, caption + _first(len(frame), len(found), where), formats, whole=True)


def _leakage(audit: Audit) -> list[Block]:
    found = audit.findings[audit.findings["kind"] == "leakage"]
    if found.empty:
        return [
            Paragraph("No single column predicts the target so well that it looks like a leak.")
        ]
    frame = pd.DataFrame(
        {
            "column": [name_text(name) for name in found["column"]],
            "score": [float(score) for score in found["score"]],
            "evidence": [cut(visible(text), NOTE) for text in found["evidence"]],
        }
    )
    return [
        Paragraph(
            "A column that predicts the target alone is often a consequence of it, or an older "
            "copy. If its value is not known when a prediction is needed, leave it out and audit "
            "again."
        ),
        Table(frame, "Columns that may leak.", {"score": "{:.3f}"}, whole=True),
    ]


def _effects(audit: Audit, names: Sequence[str]) -> list[Block]:
    found: Any = audit.findings
    harmful, helpful = found[found["kind"] == "harmful"], found[found["kind"] == "helpful"]
    if harmful.empty and helpful.empty:
        why = "" if audit.settings.influence else " Influences were not asked for."
        return [Paragraph(f"There are no effects to show.{why}")]
    blocks: list[Block] = [
        Paragraph(
            "The influence of a row says what happens to the loss on held-out rows if the row "
            "counts for a little more. Positive = it helps (the loss falls), negative = it harms "
            "(the loss rises). A row may harm because it is wrong, or because it is right and "
            "rare: look before removing it."
        )
    ]
    for part, caption in ((harmful, "Rows that harm most."), (helpful, "Rows that help most.")):
        if len(part):
            blocks.append(_findings(part, names, MOST_EFFECTS, caption, "influence"))
    return blocks


def _scores(audit: Audit) -> list[Block]:
    signals = Signals(audit.rows, regression=audit.summary.task == "regression")
    words = {"low": "low", "high": "high", None: "–"}
    lines = [
        (known.name, key, words[known.bad] + (", below 0" if known.zero else ""), known.meaning)
        for key, known in ((key, signals.known(key)) for key in signals.keys)
    ]
    settings = audit.settings
    blocks: list[Block] = [
        Paragraph(
            "No row is judged by a model that has seen it. Networks are trained on "
            f"{settings.folds - 1} of {settings.folds} parts of the rows and judge the part left "
            "out, trees judge the rows that were not in their sample, and neighbours are the "
            f"{settings.neighbours} nearest other rows. The suspicion of a row, between 0 and 1, "
            "combines what they say about its label; a second one, of its cells, is kept apart, "
            "because a wrong label and a wrong cell are found by different signals."
        ),
        Paragraph(
            "Influence adds what these cannot: which training rows are behind a prediction, and "
            "what a row does to others. The influence of row i on row j is "
            "I[j, i] = g_jᵀ (C + λI)⁻¹ g_i, with the gradients g of their losses and the curvature "
            "C of the mean training loss. Positive = row i helps row j (up-weighting it lowers the "
            "loss of j), negative = it harms. Where it disagrees with the other signals, the "
            "details of the row say so."
        ),
    ]
    if lines:
        heads = ["signal", "in rows.parquet", "suspicious if", "what it is"]
        blocks.append(
            Table(
                pd.DataFrame(lines, columns=heads),
                "Signals. In the details of a row, a signal says wrong (✗) if it is on the bad "
                "side of 0, where that has a meaning, or else among the most suspicious 5 % of all "
                "rows, or as many as are flagged; fine (✓) outside the most suspicious 20 %; else "
                "unclear (~).",
                whole=True,
            )
        )
    return blocks


def _model(audit: Audit) -> list[Block]:
    summary = audit.summary
    metric = "R²" if summary.task == "regression" else "accuracy"
    blocks: list[Block] = []
    if summary.quality:
        blocks.append(_judges(summary, f"held-out {metric}"))
    told: list[str] = []
    if summary.noise is not None:
        told.append(f"About {share(summary.noise)} of the targets are estimated to be wrong.")
    if summary.recall is not None:
        told.append(
            f"Of the wrong targets that were planted into the table, {share(summary.recall)} got a "
            "flag: about as much can be expected of the real ones, if they are as random."
        )
    if told:
        blocks.append(Paragraph(" ".join(told)))
    if summary.classes:
        frame = pd.DataFrame(
            {
                "class": [name_text(name) for name in summary.classes],
                "rows": list(summary.classes.values()),
            }
        ).head(MOST_COLUMNS)
        caption = "Rows of each class." + _first(len(frame), len(summary.classes))
        blocks.append(Table(frame, caption, {"rows": "{:,}"}, whole=True))
    return blocks or [Paragraph("It was not measured.")]


def _judges(summary: Summary, score: str) -> Table:
    """How well each judge predicts, and how well it finds planted faults."""
    names = [*summary.quality, *(name for name in summary.planted if name not in summary.quality)]
    frame = pd.DataFrame(
        {
            "judge": [JUDGES.get(name, (name_text(name), ""))[0] for name in names],
            score: [summary.quality.get(name, np.nan) for name in names],
            "finds planted": [summary.planted.get(name, np.nan) for name in names],
            "what it is": [JUDGES.get(name, ("", ""))[1] for name in names],
        }
    )
    told = f"How well each judge predicts rows that it has not seen ({score}; 1 is perfect)"
    if summary.planted:
        told += (
            ", and how well it tells wrong targets that were planted into the table from all other "
            "rows (area under the ROC curve; 1 is perfect, 0.5 is chance)"
        )
    else:
        frame = frame.drop(columns="finds planted")
    formats: dict[Hashable, Format] = {score: "{:.3f}"}
    if summary.planted:
        formats["finds planted"] = "{:.3f}"
    return Table(frame, f"{told}. Wrong targets among the rows lower both.", formats, whole=True)


def _settings(audit: Audit) -> list[Block]:
    source = audit.table.source
    origin = {
        "file": source.name,
        "format": source.format,
        "delimiter": source.delimiter,
        "encoding": source.encoding,
        "SHA-256": source.digest,
    }
    settings = {one.name: getattr(audit.settings, one.name) for one in fields(audit.settings)}
    given = {name: value for name, value in settings.items() if value not in (None, {}, ())}
    lines = [
        (name, cut(visible(_plain(value)), NOTE))
        for name, value in ({**origin, **given}).items()
        if value is not None
    ]
    seconds = audit.summary.seconds
    blocks: list[Block] = [
        Paragraph(
            "config.yaml beside this page holds all settings; upweight audit --config "
            "RUN/config.yaml does the same again, where RUN is the folder of this page. With the "
            "same file and the same version it gives the same findings. rows.parquet has a line "
            "for each row of the table with its suspicion and every signal, findings.csv one for "
            "each finding."
        ),
        Table(
            pd.DataFrame(lines, columns=["setting", "value"]),
            "What was audited, and how.",
            whole=True,
        ),
    ]
    if seconds:
        times = pd.DataFrame(
            {"step": [visible(s) for s in seconds], "seconds": list(seconds.values())}
        )
        total = math.fsum(seconds.values())
        caption = f"Where the time went: {a_number(total, 3)} seconds in all."
        blocks.append(Table(times, caption, {"seconds": "{:,.1f}"}))
    return blocks


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {kind}" for name, kind in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
