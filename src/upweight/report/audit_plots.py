"""Plots of an audit. Every axis says what the number means and which way is worse.

Plain arrays and parts of an `Audit` go in. Names of classes and columns come from the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from upweight.auditing.audit import Expected, Verification
from upweight.report.inputs import finite_vector, row_mask, short_label
from upweight.report.plots import plot_confusion
from upweight.report.style import (
    BLUE,
    GREY,
    MAX_VECTORS,
    RED,
    axes,
    legend_above,
    tidy,
)

__all__ = [
    "plot_expected",
    "plot_flagged_columns",
    "plot_given_and_proposed",
    "plot_proposed_numbers",
    "plot_suspicion",
    "plot_verification",
]

MANY = 500  # rows from which counts are on a log axis
MOST_CLASSES = 10  # of a confusion matrix; with more, pairs are counted
MOST_BARS = 15


def plot_suspicion(
    suspicion: ArrayLike, flagged: ArrayLike | None = None, ax: Axes | None = None
) -> Axes:
    """Histogram of the suspicion of the rows, those with a flag in a second colour.

    Parameters
    ----------
    suspicion
        (n,) in [0, 1]: 1 where the given label is most probably wrong.
    flagged
        Rows with a label flag: (n,) booleans, or positions.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    From 500 rows on the counts are on a log axis, on which a few bad rows can be seen.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_suspicion([0.1, 0.2, 0.9], [False, False, True], Figure().add_subplot())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['not flagged (2)', 'flagged (1)']
    """
    values = finite_vector(suspicion, "suspicion")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"suspicion must be in [0, 1], got values from {values.min()} to {values.max()}"
        )
    mask = row_mask(flagged, len(values))
    log = len(values) >= MANY
    ax = axes(ax)
    edges = np.linspace(0, 1, 41)
    tallest = 1.0
    for part, colour, name in ((~mask, BLUE, "not flagged"), (mask, RED, "flagged")):
        if not part.any():
            continue
        tallies, _, _ = ax.hist(
            values[part],
            bins=edges.tolist(),
            color=colour,
            alpha=0.65,
            log=log,
            label=f"{name} ({part.sum():,})",
        )
        tallest = max(tallest, float(np.max(np.asarray(tallies))))
    if log:
        ax.set_ylim(0.6, tallest * 1.5)  # from below one, so that a bar of one row can be seen
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(_count))
    ax.set_xlim(-0.01, 1.01)
    ax.set_xlabel("suspicion: label fits ← 0 … 1 → label looks wrong")
    ax.set_ylabel("rows (log scale)" if log else "rows")
    legend_above(ax)
    tidy(ax, grid="y")
    return ax


def plot_given_and_proposed(
    given: Sequence[Any], proposed: Sequence[Any], ax: Axes | None = None
) -> Axes:
    """Counts of given against proposed labels of the flagged rows.

    Parameters
    ----------
    given, proposed
        (k,) labels of the flagged rows, at least one.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    With more than ten classes the most frequent pairs are shown as bars.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_given_and_proposed(["no", "no"], ["yes", "yes"], Figure().add_subplot())
    >>> ax.get_xlabel()
    'proposed label'
    """
    classes = set(map(str, given)) | set(map(str, proposed))
    if len(classes) <= MOST_CLASSES:
        ax = plot_confusion([str(v) for v in given], [str(v) for v in proposed], ax=ax)
        ax.set_xlabel("proposed label")
        return ax
    pairs = Counter(zip(map(str, given), map(str, proposed), strict=True))
    lines = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_BARS]
    names = [f"{short_label(a, 16)} → {short_label(b, 16)}" for (a, b), _ in lines]
    label = "flagged rows, by given → proposed label"
    return _bars(axes(ax), names, [count for _, count in lines], label)


def plot_proposed_numbers(
    given: ArrayLike,
    proposed: ArrayLike,
    flagged: ArrayLike | None = None,
    target: str = "target",
    ax: Axes | None = None,
) -> Axes:
    """Proposed against given numbers, in regression; flagged rows are circled.

    Parameters
    ----------
    given, proposed
        (n,) what the table says, and what models say that have not seen the row. Pairs that lack
        one of them are left out.
    flagged
        Rows with a flag: (n,) booleans, or positions.
    target
        Name of the column, for the axes.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_proposed_numbers([1, 2, 30], [1, 2, 3], [2], "price", Figure().add_subplot())
    >>> ax.get_ylabel()
    'proposed price'
    """
    x, y = np.asarray(given, dtype=np.float64), np.asarray(proposed, dtype=np.float64)
    mask = row_mask(flagged, len(x))
    there = np.isfinite(x) & np.isfinite(y)
    x, y, mask = finite_vector(x[there], "given"), finite_vector(y[there], "proposed"), mask[there]
    ax = axes(ax)
    ax.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1.2, label="both agree")
    for part, colour, name in ((~mask, BLUE, "not flagged"), (mask, RED, "flagged")):
        if part.any():
            ax.scatter(
                x[part],
                y[part],
                s=14 if colour == BLUE else 26,
                color=colour,
                alpha=0.35 if colour == BLUE else 0.8,
                linewidths=0,
                rasterized=bool(part.sum() > MAX_VECTORS),
                label=f"{name} ({part.sum():,})",
            )
    # The line must not widen the axes.
    for low, high, limit in ((x.min(), x.max(), ax.set_xlim), (y.min(), y.max(), ax.set_ylim)):
        margin = 0.05 * (high - low) or 1.0
        limit(low - margin, high + margin)
    name = short_label(target)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel(f"given {name}")
    ax.set_ylabel(f"proposed {name}")
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def plot_expected(expected: Sequence[Expected], ax: Axes | None = None) -> Axes:
    """How many of the most suspicious rows are expected to be wrong, with the interval.

    Parameters
    ----------
    expected
        Of `Summary.expected`, at least one.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    On the dashed line all of them are wrong.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_expected([Expected(10, 9.0, 8.0, 10.0)], Figure().add_subplot())
    >>> ax.get_xlabel()
    'rows looked at, most suspicious first'
    """
    lines = sorted(expected, key=lambda one: one.k)
    if not lines:
        raise ValueError("expected must have at least one entry, got none")
    k = np.array([0, *(one.k for one in lines)], dtype=np.float64)
    wrong, low, high = (
        finite_vector([0.0, *(getattr(one, name) for one in lines)], name)
        for name in ("wrong", "low", "high")
    )
    ax = axes(ax)
    ax.plot((0, k[-1]), (0, k[-1]), color=GREY, linestyle="--", linewidth=1.2, label="all wrong")
    ax.fill_between(k, low, high, color=BLUE, alpha=0.18, linewidth=0, label="interval")
    ax.plot(k, wrong, color=BLUE, marker="o", markersize=4, linewidth=1.8, label="expected")
    ax.set_xlim(0, k[-1] * 1.02)
    ax.set_ylim(0, max(k[-1], float(high.max())) * 1.04)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(_count))
    ax.set_xlabel("rows looked at, most suspicious first")
    ax.set_ylabel("truly wrong among them")
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def plot_verification(found: Verification, ax: Axes | None = None) -> Axes:
    """Held-out score with all rows, without the flagged and without as many random ones.

    Parameters
    ----------
    found
        With a line per ``what``: dots with intervals. With several numbers of removed rows for one
        of them, as `verify` gives: curves, and a diamond for the flagged rows. Where scores were
        taken on several sets of held-out rows (``held_out``), those on ``"all"`` are shown.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame(
    ...     {
    ...         "what": ["all rows", "without flagged"],
    ...         "removed": [0, 9],
    ...         "score": [0.8, 0.9],
    ...         "low": [0.7, 0.8],
    ...         "high": [0.85, 0.95],
    ...     }
    ... )
    >>> found = Verification("accuracy", table, (0.1, 0, 0.2), (0.1, 0, 0.2), 5, "a fifth")
    >>> plot_verification(found, Figure().add_subplot()).get_xlabel()
    'held-out accuracy (higher is better)'
    """
    table: Any = found.table
    if "held_out" in table.columns and (table["held_out"] == "all").any():
        table = table[table["held_out"] == "all"]
    table = table[np.isfinite(_numbers(table, "score"))]
    if table.empty:
        raise ValueError("the verification must have at least one score, got none")
    label = f"held-out {short_label(found.metric)} (higher is better)"
    ax = axes(ax)
    if bool(table["what"].duplicated().any()):
        return _curves(ax, table, label)
    for y, line in enumerate(table.to_dict("records")):
        colour = _colour_of(str(line["what"]))
        ends = [float(line[end]) for end in ("low", "high")]
        if np.isfinite(ends).all():
            ax.plot(ends, (y, y), color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
        ax.plot(float(line["score"]), y, "o", color=colour, markersize=7)
    names = [
        short_label(line["what"]) + (f"\n(−{int(line['removed']):,})" if line["removed"] else "")
        for line in table.to_dict("records")
    ]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel(label, loc="right")
    tidy(ax, grid="x")
    return ax


def plot_flagged_columns(counts: Mapping[str, int], ax: Axes | None = None) -> Axes:
    """How many cells of each column do not fit the rest of their row, the most on top.

    Parameters
    ----------
    counts
        Flagged cells by column, at least one.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_flagged_columns({"age": 3, "size": 1}, Figure().add_subplot())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['age', 'size']
    """
    lines = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_BARS]
    if not lines:
        raise ValueError("counts must have at least one column, got none")
    names = [short_label(name) for name, _ in lines]
    return _bars(axes(ax), names, [count for _, count in lines], "cells that do not fit")


def _bars(ax: Axes, names: Sequence[str], counts: Sequence[int], label: str) -> Axes:
    position = np.arange(len(counts))
    ax.barh(position, counts, color=RED, alpha=0.75, height=0.7)
    for y, count in enumerate(counts):
        ax.annotate(
            f"{count:,}",
            (count, y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.set_yticks(position, names)
    ax.set_ylim(len(counts) - 0.4, -0.6)
    ax.set_xlim(0, max(counts) * 1.12)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_count))
    ax.set_xlabel(label, loc="right")
    ax.tick_params(axis="y", length=0)
    tidy(ax, grid="x")
    ax.spines["left"].set_visible(False)
    return ax


def _curves(ax: Axes, table: pd.DataFrame, label: str) -> Axes:
    """A line over the rows removed for each what, from all rows on; a diamond for the flagged."""
    base = table[table["what"] == "all rows"]
    for what, part in table.groupby("what", sort=False):
        single = len(part) == 1
        if what == "all rows" or (single and what != "without flagged"):
            continue
        colour = _colour_of(str(what))
        lines: Any = part if single else pd.concat([base, part])
        lines = lines.sort_values("removed")
        removed, low, score, high = (
            _numbers(lines, name) for name in ("removed", "low", "score", "high")
        )
        marker, line = ("D", "none") if single else ("o", "--" if colour == GREY else "-")
        ax.plot(removed, score, color=colour, marker=marker, markersize=8 if single else 4,
                linestyle=line, linewidth=1.8, zorder=4 if single else 3,
                label=short_label(what, limit=32))  # fmt: skip
        there = np.isfinite(low) & np.isfinite(high)
        if single:
            ax.vlines(removed[there], low[there], high[there], color=colour, alpha=0.5, linewidth=3)
        else:
            ax.fill_between(removed[there], low[there], high[there], color=colour, alpha=0.15,
                            linewidth=0)  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_count))
    ax.set_xlabel("training rows removed")
    ax.set_ylabel(label)
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def _colour_of(what: str) -> str:
    if "random" in what:
        return GREY
    return RED if "flagged" in what else BLUE


def _numbers(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return frame[name].to_numpy(dtype=np.float64)


def _count(value: float, position: int | None = None) -> str:
    return f"{value:,.0f}"
