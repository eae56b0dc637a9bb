"""One self-contained HTML page from headings, paragraphs, key numbers, figures and tables.

The page loads nothing: no font, no image, no script from elsewhere, and a content security policy
forbids all of it. Nothing runs but a script of upweight's own, where the report has one, which the
policy knows by its hash. Every text that can come from data is escaped by the template. The same
report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import math
import numbers
import os
import re
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import jinja2
import matplotlib
import matplotlib.figure
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from upweight.report.svg import to_svg

__all__ = [
    "Block",
    "Fact",
    "Facts",
    "Figure",
    "Format",
    "Html",
    "Paragraph",
    "Report",
    "Section",
    "Table",
    "render",
    "template",
    "write",
    "write_html",
]

Format = str | Callable[[Any], str]
CUT = 80  # characters of a cell that are shown at once


@dataclass(frozen=True, eq=False)
class Paragraph:
    """Plain text; the tones ``"note"`` and ``"warning"`` set it apart in a box."""

    text: str
    tone: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True, eq=False)
class Fact:
    """One key number: what it is, its value as it should be read, and a remark."""

    label: str
    value: object
    note: str = ""
    tone: Literal["plain", "good", "bad"] = "plain"


@dataclass(frozen=True, eq=False)
class Facts:
    """Key numbers, shown as a row of tiles."""

    items: Sequence[Fact]


@dataclass(frozen=True, eq=False)
class Figure:
    """A matplotlib figure, shown as an image that follows the light or dark theme of the reader.

    Black, white and the colours of :mod:`upweight.report.plots` are adapted, all others stay.
    ``alt`` says in words what there is to see; the caption stands in for it.
    """

    figure: matplotlib.figure.Figure
    caption: str
    alt: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """A data frame without its index. The first column names the row.

    Attributes
    ----------
    frame
        What to show. Call ``reset_index()`` before where the index matters.
    caption
        What the table says.
    formats
        By column name: a format such as ``"{:+.2f}"``, or a function of the value.
    highlight_rows
        Positions of rows to set apart.
    highlight_label
        What these rows are, for the caption and for screen readers.
    highlight_column
        Name of the column that the table is about, for instance the one it is sorted by.
    whole
        Show every cell in full; otherwise long ones are cut, and open on a click.
    """

    frame: pd.DataFrame
    caption: str = ""
    formats: Mapping[Hashable, Format] = field(default_factory=dict[Hashable, Format])
    highlight_rows: Collection[int] = ()
    highlight_label: str = "marked"
    highlight_column: Hashable | None = None
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Html:
    """Markup from a template of upweight's own, which has escaped all that came from data."""

    markup: Markup


Block = Paragraph | Facts | Figure | Table | Html


@dataclass(frozen=True, eq=False)
class Section:
    """A heading with blocks under it. ``id`` is the address within the page; see `render`."""

    title: str
    blocks: Sequence[Block]
    id: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """The whole page: what matters first, then the sections.

    ``style`` is added to the style sheet, and ``script`` runs once the page is there: both as they
    are, so nothing in them may come from data.
    """

    title: str
    summary: str | Sequence[Block]
    sections: Sequence[Section]
    kicker: str = ""
    footer: str = ""
    style: str = ""
    script: str = ""


def render(report: Report) -> str:
    """HTML of a report.

    The address of a section is its ``id``, or else made from its title; an address that is taken
    gets a number. Consecutive figures stand side by side where the window is wide enough.

    Parameters
    ----------
    report
        Its figures are drawn by this call.

    Returns
    -------
    str
        A whole document, the same for the same report.

    Raises
    ------
    ValueError
        A table names a format or a highlight that is not among its columns or rows.

    Examples
    --------
    >>> page = render(Report("Wine", "All <good>.", [Section("Rows", [Paragraph("None.")])]))
    >>> "All &lt;good&gt;." in page
    True
    """
    figure_numbers = iter(range(1, 1 << 31))
    summary = report.summary
    blocks = [Paragraph(summary)] if isinstance(summary, str) else summary
    taken = {"top", "summary"}
    sections: list[dict[str, Any]] = []
    for i, section in enumerate(report.sections, start=1):
        address = _address(section.id or section.title, f"section-{i}", taken)
        groups = _groups(section.blocks, figure_numbers)
        sections.append({"title": section.title, "id": address, "groups": groups})
    page = template("report.html.jinja").render(
        report=report,
        summary=_groups(blocks, figure_numbers),
        sections=sections,
        style=Markup(report.style),
        script=Markup(report.script),
        script_hash=base64.b64encode(hashlib.sha256(report.script.encode()).digest()).decode(),
    )
    # Half of a surrogate pair cannot be written as UTF-8, and U+0000 is not allowed in HTML.
    return page.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Render a report into a file, which appears whole or not at all.

    Parameters
    ----------
    report
        See `render`.
    path
        Of the HTML file. An existing one is replaced; its folder must exist.

    Returns
    -------
    Path
        Where the file is.
    """
    return write_html(render(report), path)


def write_html(html: str, path: str | os.PathLike[str]) -> Path:
    """Write a page that is rendered already into a file, which appears whole or not at all."""
    target = Path(path)
    content = html.encode()  # before the first file exists
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def template(name: str) -> jinja2.Template:
    """A template of this package, which escapes whatever is no `Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _address(wanted: str, otherwise: str, taken: set[str]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", wanted.lower())[:60].strip("-") or otherwise
    address, repeat = slug, 1
    while address in taken:
        repeat += 1
        address = f"{slug}-{repeat}"
    taken.add(address)
    return address


def _groups(blocks: Sequence[Block], figure_numbers: Iterator[int]) -> list[dict[str, Any]]:
    """Views of the blocks by kind, for the template; figures that follow each other share a row."""
    groups: list[dict[str, Any]] = []
    for kind, members in groupby(blocks, type):
        views = [_view(block, figure_numbers) for block in members]
        for part in [views] if kind is Figure else [[view] for view in views]:
            groups.append({"kind": kind.__name__.lower(), "views": part})
    return groups


def _view(block: Block, figure_numbers: Iterator[int]) -> Any:
    if isinstance(block, Figure):
        root = to_svg(block.figure, f"f{next(figure_numbers)}-", block.alt or block.caption)
        width = round(float(root.attrib["viewBox"].split()[2]))
        svg = Markup(ElementTree.tostring(root, encoding="unicode"))
        return {"svg": svg, "width": width, "caption": block.caption}
    return _table(block) if isinstance(block, Table) else block


# ---- tables -------------------------------------------------------------------------------------


def _table(table: Table) -> dict[str, Any]:
    frame, n = table.frame, len(table.frame)
    known = set(frame.columns)
    wanted = {*table.formats, *([] if table.highlight_column is None else [table.highlight_column])}
    if wanted - known:
        unknown = sorted(map(str, wanted - known))
        raise ValueError(
            f"formats and highlight_column must name columns of the table {list(known)!r:.300}, "
            f"got {unknown!r:.300}"
        )
    rows = set(table.highlight_rows)
    if not rows <= set(range(n)):
        raise ValueError(
            f"highlight_rows must be positions between 0 and {n - 1}, got {sorted(rows)!r:.300}"
        )
    columns: list[dict[str, Any]] = []
    for j, name in enumerate(frame.columns):
        column = frame.iloc[:, j]
        text = _formatter(column, table.formats.get(name))
        columns.append(
            {
                "header": _header(name),
                "full": str(name),
                "numeric": _is_numeric(column),
                "key": name == table.highlight_column,
                "cells": [_cell(value, text, whole=table.whole) for value in column],
            }
        )
    return {"table": table, "columns": columns, "marked": [i in rows for i in range(n)]}


def _header(name: object) -> Markup:
    """May break after the characters that join words in column names, and is not too long."""
    parts = re.split(r"(?<=[_/.\-])", _cut(str(name)))
    return Markup("<wbr>").join(escape(part) for part in parts)


def _cell(value: object, text: Callable[[Any], str], *, whole: bool) -> dict[str, Any]:
    missing = pd.api.types.is_scalar(value) and bool(pd.isna(value))  # pyright: ignore[reportArgumentType, reportCallIssue]
    full = "–" if missing else text(value)
    return {"full": full, "short": full if whole else _cut(full), "missing": missing}


def _cut(text: str) -> str:
    return text if len(text) <= CUT else text[: CUT - 1].rstrip() + "…"


def _is_numeric(column: pd.Series) -> bool:
    values = list(column.dropna())
    if not values:
        return pd.api.types.is_numeric_dtype(column)
    return all(isinstance(v, numbers.Real) and not isinstance(v, bool | np.bool_) for v in values)


def _formatter(column: pd.Series, wanted: Format | None) -> Callable[[Any], str]:
    if isinstance(wanted, str):
        return partial(_formatted, wanted)
    if wanted is not None:
        return wanted
    if not _is_numeric(column):
        return _plain
    values = np.array([float(value) for value in column.dropna()])
    values = values[np.isfinite(values)]
    largest = float(np.abs(values).max()) if values.size else 0.0
    if largest >= 1e15 or 0 < largest < 1e-4:
        return "{:.3g}".format
    # As many decimals for all as give the largest value four digits: the points stand in a line.
    most = min(max(3 - math.floor(math.log10(largest or 1)), 0), 6)
    rounded = np.round(values, most)
    decimals = next(d for d in range(most + 1) if (np.round(values, d) == rounded).all())
    return f"{{:.{decimals}f}}".format


def _formatted(pattern: str, value: object) -> str:
    try:
        return pattern.format(value)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"the format {pattern!r} cannot show {value!r:.80}: {error}") from error


def _plain(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return str(value)
