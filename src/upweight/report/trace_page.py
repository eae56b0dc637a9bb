"""The page of ``upweight trace``: each query with the rows that help and harm it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from upweight.report.audit_text import counted, cut, name_text, visible
from upweight.report.page import (
    Fact,
    Facts,
    Figure,
    Html,
    Paragraph,
    Report,
    Section,
    Table,
    render,
    template,
    write_html,
)
from upweight.report.plots import draw
from upweight.report.style import BLUE, DIRECTION, RED, tidy
from upweight.report.trace_run import SHOWN_QUERIES, SHOWN_ROWS, Highlight, TraceResult

__all__ = ["build", "write"]

TEXT = 1_200  # characters of a text
TOKENS = 240  # tokens of a text that are marked
LISTED = 10  # rows in the table of means, from either end
FAINT = 0.06  # of the largest score of a token: below it there is no mark
_TEMPLATES = Path(__file__).parent / "templates"


def write(result: TraceResult, path: str | os.PathLike[str]) -> Path:
    """Write the page of a run into a file, which appears whole or not at all."""
    return write_html(build(result), path)


def build(result: TraceResult) -> str:
    """The page of a run as HTML: one file that loads nothing; all texts are escaped."""
    settings = result.prepared.settings
    macros: Any = template("trace.html.jinja").module
    queries = [_query(result, at) for at in range(min(SHOWN_QUERIES, len(result.scores)))]
    more = len(result.scores) - len(queries)
    listed = [Html(Markup(macros.queries(queries)))]
    after = (
        [Paragraph(f"{counted(more, 'more query', 'more queries')} in top.parquet.", "note")]
        if more > 0
        else []
    )
    return render(
        Report(
            kicker=f"upweight trace · {name_text(Path(settings.model).resolve().name)}",
            title="Which training rows made the model answer so?",
            summary=[Paragraph(_lead(result)), _tiles(result)],
            sections=[
                Section("Queries", [*listed, *after], "queries"),
                Section("On average", [_figure(result), *_means(result)], "average"),
                Section("How it was computed", [_plan(result), *_notes(result)], "computed"),
            ],
            footer=(
                f"{counted(len(result.rows), 'training row')}, "
                f"{counted(len(result.scores), 'query', 'queries')}, seed {settings.seed}. "
                "settings.yaml beside this page has the settings, rows.parquet and top.parquet the "
                "tables, scores/ all scores."
            ),
            style=(_TEMPLATES / "trace.css").read_text(encoding="utf-8"),
        )
    )


def _lead(result: TraceResult) -> str:
    return (
        "A positive score says that a training row helps: had it weighed more in training, the "
        "loss of the query would be lower. A negative one says that it harms. Marked words carry "
        "the score of their row."
        if result.highlights
        else "A positive score says that a training row helps: had it weighed more in training, "
        "the loss of the query would be lower. A negative one says that it harms."
    )


def _tiles(result: TraceResult) -> Facts:
    prepared = result.prepared
    share = prepared.chosen / prepared.total
    return Facts(
        [
            Fact("training rows", f"{len(result.rows):,}", f"{prepared.train.tokens:,} tokens"),
            Fact("queries", f"{len(result.scores):,}", f"{prepared.queries.tokens:,} tokens"),
            Fact("parameters", _short(prepared.chosen), f"{100 * share:.1f} % of the model"),
            Fact(
                "covered",
                f"{100 * prepared.covered:.0f} %",
                "of these have Kronecker factors",
                "plain" if prepared.covered > 0.9 else "bad",
            ),
        ]
    )


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


# ---- queries -------------------------------------------------------------------------------------


def _query(result: TraceResult, at: int) -> dict[str, Any]:
    own: Any = result.top[result.top["query"] == at]
    largest = max(
        (
            float(np.abs(mark.scores).max(initial=0.0))
            for (query, _), mark in result.highlights.items()
            if query == at
        ),
        default=0.0,
    )
    sides: list[dict[str, Any]] = []
    for direction, title in (("helpful", "Helps"), ("harmful", "Harms")):
        lines = own[own["direction"] == direction].head(SHOWN_ROWS)
        rows = [_row(result, at, line, largest) for line in lines.to_dict("records")]
        sides.append({"kind": direction, "title": title, "rows": rows})
    queries = result.prepared.queries
    return {
        "number": at + 1,
        "name": name_text(queries.names[at]),
        "text": readable(cut(queries.texts[at], TEXT)),
        "sides": sides,
        "open": at < 3,
    }


def _row(result: TraceResult, query: int, line: dict[str, Any], largest: float) -> dict[str, Any]:
    mark = result.highlights.get((query, int(line["row"])))
    if mark is None or largest == 0.0:
        spans = [{"text": readable(cut(str(line["text"]), TEXT)), "kind": "", "strength": ""}]
    else:
        spans = _spans(mark, largest)
    return {
        "name": name_text(line["name"]),
        "score": _signed(float(line["score"])),
        "spans": spans,
    }


def _spans(mark: Highlight, largest: float) -> list[dict[str, str]]:
    """The tokens in order, each with its sign and strength; of many, those where the score is."""
    first, last = _window(mark.scores)
    spans: list[dict[str, str]] = []
    if first:
        spans.append({"text": "… ", "kind": "", "strength": ""})
    for piece, score in zip(mark.pieces[first:last], mark.scores[first:last], strict=True):
        strength = abs(float(score)) / largest
        kind = "" if strength < FAINT else "helps" if score > 0 else "harms"
        text = readable(piece)
        if kind and spans and text[:1] == " ":  # the mark is on the word
            spans[-1]["text"] += " " if not spans[-1]["kind"] else ""
            text = text[1:] if not spans[-1]["kind"] else text
        if spans and not kind and not spans[-1]["kind"]:
            spans[-1]["text"] += text
            continue
        told = f"{0.12 + 0.5 * strength:.2f}" if kind else ""
        spans.append({"text": text, "kind": kind, "strength": told})
    if last < len(mark.pieces):
        spans.append({"text": " …", "kind": "", "strength": ""})
    return spans


def _window(scores: np.ndarray) -> tuple[int, int]:
    """The consecutive tokens with the largest sum of sizes."""
    n = len(scores)
    if n <= TOKENS:
        return 0, n
    sums = np.concatenate([[0.0], np.abs(scores.astype(np.float64)).cumsum()])
    first = int((sums[TOKENS:] - sums[:-TOKENS]).argmax())
    return first, first + TOKENS


def readable(text: str) -> str:
    """Text with its lines, and every other character seen that would be hidden."""
    return "\n".join(visible(line) for line in text.replace("\t", "    ").split("\n"))


def _signed(value: float) -> str:
    told = f"{value:+,.0f}" if 1_000 <= abs(value) < 10**7 else f"{value:+.3g}"
    return told.replace("-", "\N{MINUS SIGN}")


# ---- all rows ------------------------------------------------------------------------------------


def _figure(result: TraceResult) -> Figure:
    values = result.rows["score"].to_numpy(dtype=np.float64)

    def plot(ax: Axes) -> Axes:
        _, edges, patches = ax.hist(values, bins=min(40, max(8, len(values) // 5)))
        for patch, edge, right in zip(patches, edges[:-1], edges[1:], strict=True):  # pyright: ignore[reportArgumentType]
            patch.set_facecolor(BLUE if edge + right > 0 else RED)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_xlabel(f"mean score over the queries\n{DIRECTION}")
        ax.set_ylabel("training rows")
        tidy(ax, "y")
        return ax

    return Figure(
        draw(plot),
        "Mean score of every training row. Long tails are rows that matter for these queries; the "
        "counts are on a logarithmic scale.",
        f"Histogram of {len(values):,} mean scores from {values.min():.3g} to {values.max():.3g}.",
    )


def _means(result: TraceResult) -> list[Table]:
    ordered: Any = result.rows.sort_values(["score", "row"], ascending=[False, True])
    tables: list[Table] = []
    for some, told in (
        (ordered[ordered["score"] > 0].head(LISTED), "Rows that help most on average"),
        (ordered[ordered["score"] < 0].tail(LISTED)[::-1], "Rows that harm most on average"),
    ):
        frame = some[["name", "score", "text"]].reset_index(drop=True)
        frame["name"] = [name_text(name) for name in frame["name"]]
        frame["text"] = [readable(text) for text in frame["text"]]
        frame = frame.rename(columns={"name": "row"})
        tables.append(
            Table(frame, told, formats={"score": _signed}, highlight_column="score", whole=True)
        )
    return tables


def _plan(result: TraceResult) -> Table:
    lines = result.prepared.plan()
    frame = pd.DataFrame({"what": [a for a, _ in lines], "value": [visible(b) for _, b in lines]})
    return Table(frame, "The settings of this run", whole=True)


def _notes(result: TraceResult) -> list[Paragraph]:
    return [Paragraph(visible(note), "note") for note in result.notes[:6]]
