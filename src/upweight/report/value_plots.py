"""Plots of data values. Every axis says what the number means and which way is harmful.

A `Values` goes in, or plain numbers. Names of rows come from the user.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from upweight.report.inputs import short_label
from upweight.report.plots import plot_score_distribution
from upweight.report.style import (
    BLUE,
    DIRECTION,
    GREY,
    MAX_VECTORS,
    ORANGE,
    RED,
    axes,
    legend_above,
    tidy,
)
from upweight.valuation.values import MEANING, Values

__all__ = [
    "asked_stability",
    "direction_of",
    "plot_convergence",
    "plot_value_comparison",
    "plot_value_distribution",
    "plot_values",
]

RELATIVE = "worse ← → better"  # where 0 is no boundary
MOST_ERROR = 1.5  # median errors above it are off the plot
NAME = 22  # letters of a name


def direction_of(values: Values) -> str:
    """Which way is harmful, for an axis."""
    return DIRECTION if values.meaning == MEANING else RELATIVE


def plot_values(values: Values, k: int = 20, ax: Axes | None = None, *, highest: int = 0) -> Axes:
    """The k lowest rows with their 95 % intervals, the lowest on top; and some of the highest.

    Parameters
    ----------
    values
        Of the rows. Intervals are of the sampling error; exact values are points alone, and so are
        those whose error is not known.
    k
        How many of the lowest.
    ax
        Where to draw; the current pyplot axes by default.
    highest
        How many of the highest to set below them, under a line.

    Raises
    ------
    ValueError
        If k is below 1, or no row has a value.

    Notes
    -----
    A mark that points down lies below 0 with its whole interval, one that points up above 0; a
    circle may be on either side, or its error is not known. Where 0 is no boundary, as of Data-OOB,
    all are circles.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> values = Values(np.array([0.5, -2.0, 0.1]), names=["a", "b", "c"])
    >>> ax = plot_values(values, 2, Figure().add_subplot())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['b', 'c']
    """
    known = _known(values)
    if k < 1 or highest < 0:
        raise ValueError(f"expected k of at least 1, and highest of at least 0; got {k}, {highest}")
    order = known[np.argsort(values.values[known], kind="stable")]
    low, high = order[:k], order[len(order) - min(highest, max(len(order) - k, 0)) :]
    shown = np.concatenate([low, high])
    place = np.arange(len(shown)) + (np.arange(len(shown)) >= len(low)) * 0.6
    interval = values.interval()[shown]
    signed = values.meaning == MEANING

    ax = axes(ax)
    kinds = (
        ("v", RED, "harms", interval[:, 1] < 0),
        ("^", BLUE, "helps", interval[:, 0] > 0),
        ("o", GREY, "may be either", (interval[:, 0] <= 0) & (interval[:, 1] >= 0)),
        ("o", BLUE, "not known how sure", np.isnan(interval[:, 0])),
    )
    if not signed:
        kinds = (("o", BLUE, "value", np.ones(len(shown), np.bool_)),)
    for marker, colour, name, there in kinds:
        if there.any():
            ax.hlines(place[there], *interval[there].T, color=colour, linewidth=1.8, alpha=0.55)
            ax.plot(
                values.values[shown][there], place[there], marker, color=colour, ms=5.5, label=name
            )
    if signed:
        ax.axvline(0, color=GREY, linewidth=1.2, linestyle="--", zorder=0)
    if len(high):
        ax.axhline(len(low) - 0.2, color=GREY, linewidth=0.8)
    ax.set_yticks(place, [short_label(values.names[row], NAME) for row in shown])
    ax.set_ylim(place[-1] + 0.6, -0.6)
    sampled = (values.errors[shown] > 0).any()  # not of nan
    told = "value and its 95 % interval" if sampled else "value"
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel(f"{told}: {direction_of(values)}", loc="right")
    ax.tick_params(axis="y", length=0)
    if signed:
        legend_above(ax)
    tidy(ax, grid="x")
    ax.spines["left"].set_visible(False)
    return ax


def plot_value_distribution(
    values: Values,
    marked: ArrayLike | None = None,
    marked_label: str = "marked rows",
    ax: Axes | None = None,
) -> Axes:
    """Histogram of the values of all rows, with some rows in a second colour.

    Parameters
    ----------
    values
        Rows without a value are left out.
    marked, marked_label
        Which rows are special, as (n,) booleans or positions, and what they are.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_value_distribution(Values(np.array([0.5, -2.0])), ax=Figure().add_subplot())
    >>> ax.get_xlabel()
    'value: harmful ← 0 → helpful'
    """
    known = _known(values)
    if marked is not None:
        from upweight.report.inputs import row_mask

        marked = row_mask(marked, values.n)[known]
    ax = plot_score_distribution(values.values[known], marked, marked_label, ax)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.set_xlabel(f"value: {direction_of(values)}")
    return ax


def plot_convergence(values: Values, ax: Axes | None = None) -> Axes:
    """How settled the values were after so many evaluations: stability of ranks, and their errors.

    Parameters
    ----------
    values
        From sampling.
    ax
        Where to draw; the current pyplot axes by default.

    Raises
    ------
    ValueError
        If the values have no history: they are of a closed form, or of fewer than four draws.

    Notes
    -----
    The solid line is the rank correlation to expect with another run of the same size, with its
    95 % interval; that was asked for is a dotted line, which the lower end of the interval must
    pass. The dashed line with squares is the median standard error of a value in units of the
    spread of values over rows.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from upweight.valuation import FunctionUtility, banzhaf
    >>> worth = FunctionUtility(lambda rows: float((rows % 3).sum()), 12)
    >>> ax = plot_convergence(banzhaf(worth, until=1_000), Figure().add_subplot())
    >>> ax.get_xlabel()
    'evaluations of the utility (log scale)'
    """
    history = values.history
    if not len(history):
        raise ValueError(
            "expected values of four draws or more, with a history; got values without one: those "
            "of a closed form have nothing to converge"
        )
    x, stable, low, high, error = (
        history[name].to_numpy(np.float64)
        for name in ("evaluations", "stability", "low", "high", "error")
    )
    ax = axes(ax)
    ax.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0, label="its 95 % interval")
    ax.plot(x, stable, "-o", color=BLUE, ms=3.5, label="rank stability: up is better")
    ax.plot(x, error, "--s", color=ORANGE, ms=3.5, label="median error / spread: down is better")
    wanted = asked_stability(values)
    if wanted is not None:
        ax.axhline(wanted, color=GREY, linestyle=":", linewidth=1.6, label=f"asked: {wanted:g}")
    finite = error[np.isfinite(error)]
    top = min(max(1.05, 1.05 * float(finite.max(initial=0))), MOST_ERROR)
    ax.set_ylim(min(0.0, float(stable.min())), top)
    if x[-1] > x[0]:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if x[-1] < 100 * x[0] else (1,), numticks=12)
        )
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(x[0] / 1.08, x[-1] * 1.08)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_xlabel("evaluations of the utility (log scale)")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        ax.set_xlabel("evaluations of the utility")
    ax.set_ylabel("stability, or error")
    legend_above(ax)
    tidy(ax, grid="y")
    return ax


def asked_stability(values: Values) -> float | None:
    """The rank stability that the rule asked for, if there was such a rule."""
    found = re.search(r"rank stability ≥ ([0-9.]+)", str(values.provenance.get("until", "")))
    return None if found is None else float(found[1])


def plot_value_comparison(
    x: Values | ArrayLike,
    y: Values | ArrayLike,
    ax: Axes | None = None,
    *,
    names: Sequence[Any] | None = None,
    x_name: str = "first value",
    y_name: str = "second value",
    outliers: int = 5,
) -> Axes:
    """Two scores of the same rows against each other, such as influence and data value.

    Parameters
    ----------
    x, y
        (n,) each: `Values`, or numbers of the same rows in the same order. Two `Values` with other
        orders of the same names are brought into the first one's. Rows without either are left out.
    ax
        Where to draw; the current pyplot axes by default.
    names
        Of the rows. Default: those of `Values`, else positions.
    x_name, y_name
        What the scores are.
    outliers
        So many rows are circled and named: those whose ranks by x and by y differ most.

    Raises
    ------
    ValueError
        If the rows are not the same, or fewer than two have both scores.

    Notes
    -----
    Units may differ, so that only ranks are compared: ρ is Spearman's rank correlation.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_value_comparison([1, 2, 3.0], [10, 20, 15.0], Figure().add_subplot(), outliers=0)
    >>> ax.texts[0].get_text()
    'Spearman ρ = 0.500 (3 rows)'
    """
    a, b, called = _paired(x, y, names)
    both = np.isfinite(a) & np.isfinite(b)
    a, b, called = a[both], b[both], [called[at] for at in np.flatnonzero(both)]
    if len(a) < 2:
        raise ValueError(f"expected at least two rows with both scores; got {len(a)}")
    ranks = [pd.Series(part).rank().to_numpy(np.float64) for part in (a, b)]
    told = "undefined"
    if np.ptp(ranks[0]) and np.ptp(ranks[1]):
        told = f"{np.corrcoef(ranks[0], ranks[1])[0, 1]:.3f}"

    ax = axes(ax)
    for line in (ax.axhline, ax.axvline):
        line(0, color=GREY, linestyle="--", linewidth=1.0, zorder=0)
    ax.scatter(a, b, s=16, color=BLUE, alpha=0.6, linewidths=0, rasterized=len(a) > MAX_VECTORS)
    ax.text(
        0.0, 1.02, f"Spearman ρ = {told} ({len(a):,} rows)", transform=ax.transAxes, va="bottom"
    )
    apart = np.abs(ranks[0] - ranks[1])
    far = [at for at in np.argsort(-apart, kind="stable")[:outliers] if apart[at] > 0]
    if far:
        ax.scatter(a[far], b[far], s=60, facecolors="none", edgecolors=RED, linewidths=1.5)
    middle = (a.min() + a.max()) / 2
    for at in far:
        left = a[at] > middle  # the name grows towards the middle
        ax.annotate(
            short_label(called[at], 16),
            (a[at], b[at]),
            xytext=(-7 if left else 7, 3),
            textcoords="offset points",
            ha="right" if left else "left",
            size=9,
        )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel(f"{short_label(x_name)}: {_direction(x)}")
    ax.set_ylabel(f"{short_label(y_name, 18)}: {_direction(y)}")
    ax.margins(0.08)
    tidy(ax, grid="both")
    return ax


def _direction(given: Values | ArrayLike) -> str:
    return direction_of(given) if isinstance(given, Values) else DIRECTION


def _paired(
    x: Values | ArrayLike, y: Values | ArrayLike, names: Sequence[Any] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Any]]:
    a, b = (np.asarray(part, dtype=np.float64) for part in (x, y))
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"expected two scores (n,) of the same rows; got shapes {a.shape} and {b.shape}"
        )
    if isinstance(x, Values) and isinstance(y, Values) and not x.names.equals(y.names):
        place = y.names.get_indexer(x.names)
        if (place < 0).any():
            lost = x.names[int(np.flatnonzero(place < 0)[0])]
            raise ValueError(
                f"expected values of the same rows; row {str(lost)!r:.60} is in the first alone"
            )
        b = b[place]
    own = next((part.names for part in (x, y) if isinstance(part, Values)), range(len(a)))
    called = list(own if names is None else names)
    if len(called) != len(a):
        raise ValueError(f"expected {len(a)} names, one for each row; got {len(called)}")
    return a, b, called


def _known(values: Values) -> NDArray[np.intp]:
    known = np.flatnonzero(np.isfinite(values.values))
    if not len(known):
        raise ValueError(f"expected rows with a value; none of the {values.n} rows has one")
    return known
