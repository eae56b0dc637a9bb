"""The page of ``upweight value``: the lowest and highest rows, how sure that is, what it means."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from upweight.report.audit_text import cell_text, counted, cut, name_text, share, visible
from upweight.report.page import (
    Block,
    Fact,
    Facts,
    Figure,
    Format,
    Html,
    Paragraph,
    Report,
    Section,
    Table,
    render,
    write_html,
)
from upweight.report.plots import draw
from upweight.report.value_plots import plot_convergence, plot_value_distribution, plot_values
from upweight.report.value_run import Outcome, frame_of
from upweight.report.value_settings import SAMPLED, command
from upweight.report.value_text import (
    converged,
    has_intervals,
    head,
    longer,
    meaning,
    named_alike,
    number,
    range_text,
    sureness,
    unsure,
)
from upweight.valuation.values import MEANING

__all__ = ["build", "write"]

DRAWN = 15  # rows in the plot, from the lower end
CELLS = 8  # columns of the table that are shown beside a value
LISTED = 500  # rows in a table of the page, at most
GROUPS = 4  # of numbers, where there are no classes
CLASSES = 30
STYLE = """
.command { max-width: 100%; margin: 0 0 1.25rem; padding: .75rem 1rem; overflow-x: auto;
  border: 1px solid var(--rule); border-radius: .5rem; background: var(--surface);
  font-size: .8125rem; line-height: 1.5; }
"""


def write(outcome: Outcome, path: str | os.PathLike[str]) -> Path:
    """Write the page of a run into a file, which appears whole or not at all."""
    return write_html(build(outcome), path)


def build(outcome: Outcome) -> str:
    """The page of a run as HTML: one file that loads nothing; all texts are escaped."""
    found, values = outcome.ready, outcome.values
    frame: Any = frame_of(found, values)
    target, source = name_text(found.settings.target), name_text(found.table.source.name)
    known = frame[frame["value"].notna()].sort_values(["value", "row"])
    most = min(found.settings.top, LISTED)
    low = known.head(most)
    high = known.iloc[::-1].head(min(most, max(len(known) - len(low), 0)))
    return render(
        Report(
            kicker=f"upweight value · {source}",
            title=f"Which rows help to learn “{target}”, and which harm?",
            summary=[Paragraph(meaning(found, values)), _tiles(outcome), *_warnings(outcome)],
            sections=[
                Section(
                    "Lowest rows",
                    [
                        Paragraph(
                            "Look at these first. A low value is a reason to look, no proof: wrong "
                            "rows are among them, and so are right ones that are unlike all others."
                        ),
                        *(Paragraph(told, "note") for told in named_alike(found)),
                        _listing(outcome, low, "The rows with the lowest values, lowest first."),
                    ],
                    "lowest",
                ),
                Section("In pictures", _figures(outcome), "pictures"),
                Section(
                    "Highest rows",
                    [_listing(outcome, high, "The rows with the highest values, highest first.")],
                    "highest",
                ),
                Section(
                    "By class" if found.classes else "By size of the number",
                    [_groups(outcome, frame, low)],
                    "groups",
                ),
                Section("How sure is this?", _sure(outcome), "sure"),
                Section("How it was computed", _computed(outcome), "computed"),
            ],
            footer=(
                f"{head(found)}, seed {found.settings.seed}. config.yaml beside this page has the "
                "settings, values.parquet and values.csv every row, values.npz the samples."
            ),
            style=STYLE,
        )
    )


def _tiles(outcome: Outcome) -> Facts:
    found, values = outcome.ready, outcome.values
    known = values.values[~np.isnan(values.values)]
    facts = [Fact("rows valued", f"{len(known):,}", f"of {len(found.table):,}")]
    if values.meaning == MEANING:
        below = int((known < 0).sum())
        facts.append(
            Fact("below 0", f"{below:,}", f"{share(below / max(len(known), 1))} of the rows")
        )
    elif found.task == "classification":
        below = int((known < 0.5).sum())
        facts.append(
            Fact("below 0.5", f"{below:,}", f"{share(below / max(len(known), 1))} of the rows")
        )
    if found.settings.method in SAMPLED:
        spent = int(values.provenance["evaluations"])
        computed = int(values.provenance["computed"])
        before = max(spent - computed, 0)
        note = f"{before:,} of them were known before" if before else "all by this run"
        facts.append(Fact("evaluations", f"{spent:,}", note))
        ended = "converged" if values.converged else "not converged"
        stable, reach = "not known", ""
        if len(values.history):
            last = values.history.iloc[-1]
            stable = number(last["stability"], signed=False)
            reach = range_text(last["low"], last["high"], signed=False) + "; "
        tone = "plain" if values.converged else "bad"
        facts.append(Fact("rank stability", stable, reach + ended, tone))
    elif not values.errors.any():
        facts.append(Fact("error", "0", "exact, by a formula"))
    return Facts(facts)


def _warnings(outcome: Outcome) -> list[Block]:
    """What the reader must know before any number."""
    found, values = outcome.ready, outcome.values
    told: list[Block] = []
    if values.converged is False:
        told.append(Paragraph(converged(found, values), "warning"))
        told += [_code(again) for again in (longer(outcome),) if again]
    return told


# ---- rows ----------------------------------------------------------------------------------------


def _listing(outcome: Outcome, rows: Any, caption: str) -> Table:
    found, values = outcome.ready, outcome.values
    signed = values.meaning == MEANING
    named = any(column.kind == "id" for column in found.columns)
    target = name_text(found.settings.target)
    columns: list[tuple[str, list[Any]]] = [("row", [int(row) for row in rows["row"]])]
    if named:
        columns.append(("name", [name_text(name) for name in rows["name"]]))
    columns.append(("value", list(rows["value"])))
    if has_intervals(values):
        pairs = zip(rows["low"], rows["high"], strict=True)
        columns.append(("95 % interval", [range_text(*pair, signed=signed) for pair in pairs]))
    columns.append((f"given {target}", [cell_text(cell) for cell in rows["given"]]))
    shown = [
        column.name
        for column in found.columns
        if column.kind in ("numeric", "category", "boolean", "date", "text")
    ]
    for name in shown[:CELLS]:
        cells: Any = found.table.frame[name]
        told = [cell_text(cell) for cell in cells.iloc[rows["row"].to_numpy()]]
        columns.append((_free(name_text(name), [head for head, _ in columns]), told))
    if len(shown) > CELLS:
        caption += f" {CELLS} of {len(shown):,} columns are shown."
    frame = pd.DataFrame(
        {name: pd.Series(cells, dtype=None if name in ("row", "value") else object)
         for name, cells in columns}
    )  # fmt: skip
    formats: dict[Hashable, Format] = {
        "value": lambda value: number(value, signed),
        "row": lambda row: f"{row:d}",
    }
    return Table(frame, caption, formats, highlight_column="value")


def _free(name: str, taken: list[str]) -> str:
    """A heading that is not taken."""
    repeat, free = 1, name
    while free in taken:
        repeat += 1
        free = f"{name} ({repeat})"
    return free


def _groups(outcome: Outcome, frame: pd.DataFrame, low: pd.DataFrame) -> Table:
    """Values by class, or by quarters of the numbers."""
    found, values = outcome.ready, outcome.values
    if found.classes:
        codes, names = found.y.astype(np.intp), [name_text(c) for c in found.classes]
        heading = "class"
    else:
        codes, names = _quarters(found.y)
        heading = "given number"
    signed = values.meaning == MEANING
    lowest = np.isin(frame["row"].to_numpy(), low["row"].to_numpy())
    lines: list[dict[str, Any]] = []
    for code, name in enumerate(names):
        here = (codes == code) & ~np.isnan(values.values)
        if not here.any():
            continue
        some = values.values[here]
        line: dict[str, Any] = {heading: name, "rows": int(here.sum())}
        line |= {"median value": float(np.median(some)), "lowest value": float(some.min())}
        if signed:
            line["below 0"] = float((some < 0).mean())
        line[f"of the lowest {len(low)}"] = int((here & lowest).sum())
        lines.append(line)
    told = "A class with many rows among the lowest is badly labelled, rare, or hard to tell."
    if not found.classes:
        told = "Numbers with many rows among the lowest are wrong, rare, or hard to predict."
    if len(lines) > CLASSES:
        lines = sorted(lines, key=lambda line: line["median value"])[:CLASSES]
        told += f" {CLASSES} of {len(names):,} are shown, those with the lowest medians."
    formats: dict[Hashable, Format] = {
        name: lambda value: number(value, signed) for name in ("median value", "lowest value")
    }
    if signed:
        formats["below 0"] = share
    return Table(pd.DataFrame(lines), told, formats)


def _quarters(y: np.ndarray) -> tuple[np.ndarray, list[str]]:
    cut_at: Any = pd.qcut(pd.Series(y), GROUPS, duplicates="drop")
    names = [f"{one.left:.4g} to {one.right:.4g}" for one in cut_at.cat.categories]
    return cut_at.cat.codes.to_numpy(), names


# ---- pictures ------------------------------------------------------------------------------------


def _figures(outcome: Outcome) -> list[Figure]:
    found, values = outcome.ready, outcome.values
    known = values.values[~np.isnan(values.values)]
    few = min(DRAWN, len(known))
    interval = " with their 95 % intervals" if has_intervals(values) else ""
    figures = [
        Figure(
            draw(plot_values, values, few, height=1.2 + 0.24 * few),
            f"The {few} lowest rows{interval}, by name. Where intervals overlap, the order of rows "
            "may be chance."
            if interval
            else f"The {few} lowest rows, by name.",
            f"Values of the {few} lowest rows, from {number(known.min())}.",
        ),
        Figure(
            draw(plot_value_distribution, values),
            "The values of all rows; counts on a logarithmic scale. A tail to the left is what is "
            "worth a look.",
            f"Histogram of {len(known):,} values from {number(known.min())} to "
            f"{number(known.max())}.",
        ),
    ]
    if len(values.history):
        figures.append(
            Figure(
                draw(plot_convergence, values),
                "How settled the values became. Ranks are stable where the lower end of the band "
                "has passed the dotted line.",
                converged(found, values),
            )
        )
    return figures


# ---- how sure, and how ---------------------------------------------------------------------------


def _sure(outcome: Outcome) -> list[Block]:
    found, values = outcome.ready, outcome.values
    blocks: list[Block] = [Paragraph(told) for told in sureness(found, values)]
    sign = unsure(values)
    if sign:
        blocks.append(Paragraph(f"At the 95 % level {sign}."))
    judged = (
        "Rows judge each other, wrong ones among them. With many wrong rows of one kind, these "
        "back each other."
        if found.test is None
        else "The test rows are taken to be right, and like those the model will meet."
    )
    blocks += [
        Paragraph(
            "What is not known: whether a row is wrong. A value depends on the model, the score "
            "and the rows that judge; another choice ranks rows otherwise, and no interval here "
            f"includes that. {judged}"
        ),
        Paragraph(
            "Values of near duplicates share what one of them alone would be worth. Leaving many "
            "rows out at once may do more or less than their values add up to: train without them "
            "and compare on rows held out before you believe it."
        ),
    ]
    return blocks


def _computed(outcome: Outcome) -> list[Block]:
    found, values = outcome.ready, outcome.values
    settings, source = found.settings, found.table.source
    told = dict(values.provenance)
    lines: list[tuple[str, object]] = [
        ("file", source.name),
        ("SHA-256", source.digest),
        ("what was done", found.described),
    ]
    if found.test is not None:
        lines += [("test SHA-256", found.test.source.digest)]
    plain = {one.name: getattr(settings, one.name) for one in fields(settings)}
    lines += [(k, v) for k, v in plain.items() if v not in (None, {}, ())]
    if found.p is not None and settings.p is None:
        lines.append(("p, by the number of rows", f"{found.p:.4g}"))
    for name in ("sampler_name", "readout", "until", "evaluations", "computed", "failed"):
        if name in told:
            lines.append((name.replace("sampler_name", "sampler"), told[name]))
    if values.stopped:
        lines.append(("stopped", values.stopped))
    if "seconds" in told:
        lines.append(("seconds", f"{told['seconds']:.1f}"))
    if told.get("utility"):
        lines.append(("fingerprint of the utility", told["utility"]))
    frame = pd.DataFrame(
        {
            "setting": [name for name, _ in lines],
            "value": [cut(visible(_text(value)), 400) for _, value in lines],
        }
    )
    again = command(settings, source.path or source.name, outcome.folder)
    repeat = (
        "The same command with the same file and version gives the same values"
        if settings.minutes is None
        else "How far a run comes in so many minutes depends on the machine, so values may differ"
    )
    kept = (
        f" {counted(int(told['evaluations']), 'utility', 'utilities')} are kept in utilities.db: "
        "a longer run begins with them."
        if settings.method in SAMPLED
        else ""
    )
    return [
        Paragraph(f"{repeat}.{kept}"),
        _code(again),
        Table(frame, "What was valued, and how.", whole=True),
    ]


def _code(text: str) -> Html:
    """A command, which is not broken at its hyphens."""
    return Html(Markup('<pre class="command" tabindex="0">{}</pre>').format(visible(text)))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {kind}" for name, kind in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
