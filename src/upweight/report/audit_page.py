"""The page of an audit: what to do, what was found row by row, and why."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from upweight.auditing.audit import Audit
from upweight.report import audit_plots
from upweight.report.audit_cells import Cells
from upweight.report.audit_details import Details
from upweight.report.audit_sections import sections
from upweight.report.audit_signals import flags_of
from upweight.report.audit_summary import doubt, flagged_columns, interval, lead, tiles, todo
from upweight.report.audit_suspects import MOST_LINES, Suspects, row_names
from upweight.report.audit_text import counted, name_text, visible
from upweight.report.audit_values import values_figure
from upweight.report.page import (
    Block,
    Figure,
    Html,
    Paragraph,
    Report,
    Section,
    render,
    template,
    write_html,
)
from upweight.report.plots import draw

__all__ = ["BUDGET", "build", "plots", "write"]

BUDGET = 1_980_000  # bytes of the page
FEWEST_LINES = 50

_TEMPLATES = Path(__file__).parent / "templates"
_DETAIL = re.compile(r"<!--detail (\d+)-->")
_DROPPED = "<!--dropped-->"


def build(audit: Audit) -> str:
    """The page of an audit as HTML: one file that loads nothing, of less than 2 MB.

    Parameters
    ----------
    audit
        What was found.

    Returns
    -------
    str
        A whole document, the same for the same audit. All that comes from the table is escaped.
        Where the details of all rows do not fit into the size, those of the least suspicious are
        left out, then lines of the table; and the page says so.
    """
    names = row_names(audit.rows)
    cells, most = Cells(audit.table.frame, audit.columns), MOST_LINES
    while True:
        suspects = Suspects(audit, names, most)
        page = render(_report(audit, names, suspects, cells))
        # Text that is all escapes takes six times its length.
        if len(page.encode()) <= BUDGET or most < FEWEST_LINES:
            return _with_details(page, audit, names, suspects, cells)
        most //= 2


def write(audit: Audit, path: str | os.PathLike[str]) -> Path:
    """Write the page of an audit into a file, which appears whole or not at all.

    Parameters
    ----------
    audit
        What was found.
    path
        Of the HTML file. An existing one is replaced; its folder must exist.

    Returns
    -------
    Path
        Where the file is.
    """
    return write_html(build(audit), path)


def plots(audit: Audit) -> dict[str, Canvas]:
    """The figures of an audit by name, those for which there is something to show.

    Parameters
    ----------
    audit
        What was found.

    Returns
    -------
    dict
        ``suspicion`` (its distribution), ``proposed`` (given and proposed labels or numbers),
        ``expected`` (how many of the first rows are wrong), ``columns`` (cells that do not fit),
        ``verification`` (held-out score with and without the flagged rows), ``values`` (influence
        beside KNN-Shapley values).
    """
    figures = {**_figures(audit), **values_figure(audit, row_names(audit.rows))}
    return {name: figure.figure for name, figure in figures.items()}


def _report(audit: Audit, names: list[str], suspects: Suspects, cells: Cells) -> Report:
    target, source = name_text(audit.settings.target), name_text(audit.table.source.name)
    macros = template("audit.html.jinja").module
    listing = macros.suspects({**suspects.view(), "shapes": _shapes(suspects, cells)})  # pyright: ignore[reportAttributeAccessIssue]
    steps = macros.todo(todo(audit))  # pyright: ignore[reportAttributeAccessIssue]
    found: list[Block] = [Html(Markup(_DROPPED)), Html(Markup(listing))]
    return Report(
        kicker=f"upweight audit · {source}",
        title=f"What is wrong with “{target}”?"
        if audit.summary.flagged
        else f"Is anything wrong with “{target}”?",
        summary=[
            Paragraph(lead(audit)),
            *_doubts(audit, before=True),
            Html(Markup(steps)),
            tiles(audit),
            *_doubts(audit, before=False),
        ],
        sections=[
            Section("Findings", found, "findings"),
            Section("In pictures", [*_figures(audit).values()], "pictures"),
            *sections(audit, names),
        ],
        footer=(
            f"{counted(audit.summary.rows, 'row')} of {source}, seed {audit.settings.seed}. "
            "config.yaml beside this page replays the audit."
        ),
        style=(_TEMPLATES / "audit.css").read_text(encoding="utf-8"),
        script=(_TEMPLATES / "audit.js").read_text(encoding="utf-8"),
    )


def _doubts(audit: Audit, *, before: bool) -> list[Paragraph]:
    """The most important note: before all numbers if the judges are weak, else after them."""
    weak = doubt(audit)
    notes = [visible(text) for text in audit.summary.notes[:1]]
    if not before:
        return [] if weak else [Paragraph(text, "note") for text in notes]
    return [Paragraph(text, "warning") for text in (notes or [weak])[:1]] if weak else []


def _shapes(suspects: Suspects, cells: Cells) -> Markup:
    """The shapes of the columns, which the details of all rows point to."""
    if not suspects.details:
        return Markup("")
    paths = [
        Markup('<path id="{}" d="{}"/>').format(cells.shape_id(name), column.shape)
        for name, column in cells.columns.items()
        if column.shape
    ]
    return Markup('<svg class="hidden" aria-hidden="true"><defs>{}</defs></svg>').format(
        Markup("").join(paths)
    )


def _with_details(
    page: str, audit: Audit, names: list[str], suspects: Suspects, cells: Cells
) -> str:
    """The page with as many details as fit, of the most suspicious rows first.

    Their places are comments, which no text from data can make: it is escaped.
    """
    details = Details(audit, cells, names, suspects.anchors)
    evidence = suspects.evidence()
    parts = _DETAIL.split(page)
    rows = [int(row) for row in parts[1::2]]
    plain = {row: Markup("<bdi>{}</bdi>").format(evidence[row]) for row in rows}
    # 400 bytes for the note that some are missing.
    left = BUDGET - 400 - len(page.encode()) - sum(len(text.encode()) for text in plain.values())
    shown: dict[int, str] = dict(plain)
    # Rows of the audit's own choice first, then those with an odd cell; each by suspicion.
    order = {line.row: np.nan_to_num(line.score) for line in reversed(suspects.lines)}
    dropped = 0
    for row in sorted(rows, key=lambda row: (row not in audit.details, -order[row], row)):
        html = _utf8(details.html(suspects.details[row], evidence[row]))
        cost = len(html.encode()) - len(plain[row].encode())
        if dropped or cost > left:
            dropped += 1
            continue
        left -= cost
        shown[row] = html
    parts[1::2] = [shown[row] for row in rows]
    note = ""
    if dropped:
        note = Markup("<p class=note>{}</p>").format(
            f"Details of {counted(dropped, 'row')} are left out, those of the least suspicious, to "
            "keep this page small. Their signals are in rows.parquet."
        )
    return "".join(parts).replace(_DROPPED, note, 1)


def _utf8(text: str) -> str:
    """As `render` does: what UTF-8 and HTML cannot hold is replaced."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def _figures(audit: Audit) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    suspicion = audit.rows["suspicion"].to_numpy(dtype=np.float64, na_value=np.nan)
    judged = ~np.isnan(suspicion)
    flags = flags_of(audit.rows, "label_flag")
    if judged.any():
        flagged = int(flags[judged].sum())
        figures["suspicion"] = Figure(
            draw(audit_plots.plot_suspicion, suspicion[judged], flags[judged]),
            "How suspicious the targets of all rows are. Two hills far apart mean that wrong rows "
            "are easy to tell.",
            f"Histogram of suspicion; {flagged:,} of {judged.sum():,} rows are flagged.",
        )
    figures |= _proposed(audit, flags)
    expected = audit.summary.expected
    if expected:
        last = max(expected, key=lambda one: one.k)
        figures["expected"] = Figure(
            draw(audit_plots.plot_expected, expected),
            "How many of the most suspicious rows are expected to be truly wrong, as faults tell "
            "that were planted into this table. Stop looking where the line becomes flat.",
            f"Curve: of the first {last.k:,} rows about {last.wrong:.0f} are wrong, between "
            f"{last.low:.0f} and {last.high:.0f}.",
        )
    odd = flagged_columns(audit)
    if odd:
        name, count = next(iter(odd.items()))
        figures["columns"] = Figure(
            draw(audit_plots.plot_flagged_columns, odd),
            "Cells that do not fit the rest of their row, by column. One long bar means that "
            "something happened to the whole column.",
            f"Bars of flagged cells by column; the most, {count:,}, are in {name}.",
        )
    found = audit.verification
    if found is not None and np.isfinite(found.table["score"].to_numpy(dtype=np.float64)).any():
        figures["verification"] = Figure(
            draw(audit_plots.plot_verification, found),
            "Does it help to leave rows out? Held-out "
            f"{name_text(found.metric)} of models trained on what remains, mean of "
            f"{counted(found.repeats, 'repeat')} with its interval, {visible(found.held_out)}.",
            f"The gain without the flagged rows is {interval(found.gain)}.",
        )
    return figures


def _proposed(audit: Audit, flags: NDArray[np.bool_]) -> dict[str, Figure]:
    rows = audit.rows
    if audit.summary.task == "regression":
        numbers: Any = rows[["given", "proposed"]].apply(pd.to_numeric, errors="coerce")
        given, proposed = numbers.to_numpy(dtype=np.float64, na_value=np.nan).T
        if not (np.isfinite(given) & np.isfinite(proposed)).any():
            return {}
        figure = draw(
            audit_plots.plot_proposed_numbers, given, proposed, flags, audit.settings.target
        )
        told = "Given and proposed numbers. The farther from the dashed line, the less they agree."
        alt = f"Scatter plot; {flags.sum():,} flagged rows."
        return {"proposed": Figure(figure, told, alt)}
    there = flags & rows["given"].notna().to_numpy() & rows["proposed"].notna().to_numpy()
    if not there.any():
        return {}
    pairs = rows.loc[there, ["given", "proposed"]].astype(str)
    figure = draw(
        audit_plots.plot_given_and_proposed, pairs["given"].tolist(), pairs["proposed"].tolist()
    )
    told = (
        "Given and proposed labels of the flagged rows. One large number means that two classes "
        "are mixed up, not that single rows are wrong."
    )
    first = pairs.value_counts().index[0]
    alt = f"Counts of {there.sum():,} flagged rows; most often {first[0]} for {first[1]}."
    return {"proposed": Figure(figure, told, visible(alt))}
