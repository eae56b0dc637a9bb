"""Plots of how true scores are. Every axis says what the number means and which way is better.

What :mod:`upweight.evaluate` found goes in. Names in mappings come from the user: methods, data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from upweight.evaluate import Detection, LinearDatamodelingScore
from upweight.report.inputs import finite_vector, short_label
from upweight.report.style import (
    BLUE,
    DASHES,
    DIRECTION,
    GREY,
    MAX_VECTORS,
    SERIES,
    axes,
    legend_above,
    tidy,
)

__all__ = [
    "plot_brittleness",
    "plot_damping",
    "plot_detection",
    "plot_lds",
    "plot_predicted_vs_actual",
    "plot_removal",
]

STYLES = {"score": (BLUE, "-", "o"), "random": (GREY, "--", "s")}  # by order of the rows
PREDICTIONS = {"sum": "sum of influences", "newton": "one Newton step"}
VERBS = {"remove": "removed", "add": "trained on"}


def plot_lds(
    found: Mapping[str, LinearDatamodelingScore],
    ceiling: float | Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Linear datamodeling score of each method: a dot and its interval, the first on top.

    Parameters
    ----------
    found
        Scores by the name of the method.
    ceiling
        What no method can be expected to pass, drawn as a line: `NoiseCeiling.ceiling`, or several
        of them by name.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from upweight.evaluate import prediction_score
    >>> one = prediction_score([[1.0], [2.0], [3.0], [4.0]], [[1.0], [3.0], [2.0], [4.0]])
    >>> plot_lds({"direct": one}, 0.9, Figure().add_subplot()).get_yticklabels()[0].get_text()
    'direct'
    """
    _some(found, "method")
    ax = axes(ax)
    for y, one in enumerate(found.values()):
        ax.plot(one.interval, (y, y), color=BLUE, linewidth=2, alpha=0.5, solid_capstyle="butt")
        ax.plot(one.value, y, "o", color=BLUE)
    named = ceiling if isinstance(ceiling, Mapping) else {"noise ceiling": ceiling}
    for j, (name, value) in enumerate(named.items()):
        if value is not None:
            label = f"{short_label(name)} ({value:.3f})"
            ax.axvline(value, color=GREY, linestyle=DASHES[1 + j % 3], label=label, zorder=0)
    ax.set_yticks(range(len(found)), [short_label(name) for name in found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlabel("rank correlation with retraining, LDS (higher is better)", loc="right")
    ax.tick_params(axis="y", length=0)
    if ceiling is not None:
        legend_above(ax)
    tidy(ax, grid="x")
    return ax


def plot_predicted_vs_actual(
    predicted: ArrayLike, actual: ArrayLike, ax: Axes | None = None
) -> Axes:
    """What rows were predicted to do against what leaving them out and training again showed.

    Parameters
    ----------
    predicted, actual
        Effects of the same rows or groups on the same test rows, of any shape, for instance from
        `actual_effects`; positive = the rows help. Pairs with a NaN, of failed runs, are left out.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    On the dashed line both agree. The slope is that of least squares, actual on predicted: above 1
    predictions are too small, below 1 too large or too noisy.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_predicted_vs_actual([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], Figure().add_subplot())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['predicted = actual', 'fit: slope 2.00, r = 1.000']
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(
            f"predicted and actual must be of the same shape, got {x.shape} and {y.shape}"
        )
    there = ~(np.isnan(x) | np.isnan(y))
    x, y = finite_vector(x[there], "predicted"), finite_vector(y[there], "actual")
    ax = axes(ax)
    ax.axline((0, 0), slope=1, color=GREY, linestyle="--", label="predicted = actual")
    ax.scatter(x, y, s=16, color=BLUE, alpha=0.6, linewidths=0, rasterized=len(x) > MAX_VECTORS)
    if np.ptp(x) and np.ptp(y):
        slope, intercept = np.polyfit(x, y, 1)
        label = f"fit: slope {slope:.2f}, r = {np.corrcoef(x, y)[0, 1]:.3f}"
        ends = np.array([x.min(), x.max()])
        ax.plot(ends, intercept + slope * ends, color=SERIES[1], linewidth=1.8, label=label)
    ax.set_xlabel(f"predicted effect: {DIRECTION}")
    ax.set_ylabel(f"actual effect: {DIRECTION}")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def plot_damping(dampings: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How well predictions order subsets of the training rows, by λ; λ in use is marked.

    Parameters
    ----------
    dampings
        `Check.dampings`: ``damping``, ``factor`` (1 for λ in use), and the linear datamodeling
        scores ``sum`` and ``newton``. What has none, NaN, is left out.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = {"damping": [0.1, 1], "factor": [1, 10], "sum": [0.8, 0.6], "newton": [0.9, 0.6]}
    >>> ax = plot_damping(pd.DataFrame(table), Figure().add_subplot())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['sum of influences', 'one Newton step', 'λ in use: 0.1']
    """
    _some(dampings, "damping")
    table = dampings.sort_values("damping")
    damping = finite_vector(table["damping"], "damping")
    if damping[0] <= 0:
        raise ValueError(f"dampings must be above 0, to be drawn by their logarithm: {damping[0]}")
    ax = axes(ax)
    for j, (column, name) in enumerate(PREDICTIONS.items()):
        ax.plot(
            damping,
            table[column].to_numpy(),
            color=SERIES[j],
            linestyle=DASHES[j],
            marker="os"[j],
            markersize=5,
            linewidth=1.8,
            label=name,
        )
    for used in damping[table["factor"].to_numpy() == 1]:
        ax.axvline(used, color=GREY, linestyle=":", label=f"λ in use: {used:.3g}", zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
    ax.set_xlabel("damping λ: weak ← → strong (log scale)")
    ax.set_ylabel("LDS (higher is better)")
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def plot_detection(found: Mapping[str, Detection], ax: Axes | None = None) -> Axes:
    """Share of the wrong rows that is found as rows are inspected by suspicion.

    Parameters
    ----------
    found
        Detections by the name of the method.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    The dashed line is that of rows in random order.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from upweight.evaluate import detection
    >>> one = detection([-1.0, 0.5, 1.0], [True, False, False])
    >>> ax = plot_detection({"direct": one}, Figure().add_subplot())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['direct (AUC 1.000)']
    """
    _some(found, "method")
    ax = axes(ax)
    ax.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1.2)
    for j, (name, one) in enumerate(found.items()):
        ax.plot(
            one.curve["share_inspected"].to_numpy(),
            one.curve["share_found"].to_numpy(),
            color=SERIES[j % len(SERIES)],
            linestyle=DASHES[j // len(SERIES) % len(DASHES)],
            linewidth=1.8,
            label=f"{short_label(name)} (AUC {one.auc:.3f})",
        )
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("rows inspected, most suspicious first")
    ax.set_ylabel("wrong rows found (higher is better)")
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def plot_removal(
    frame: pd.DataFrame, output: str = "mean output on the test rows", ax: Axes | None = None
) -> Axes:
    """Mean output as training rows go, or come, by score and in random order.

    Parameters
    ----------
    frame
        From `removal_curve`, of one kind.
    output
        What the outputs are and which way is better, for the axis.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    Lines are means over seeds and random orders; the bands go from the lowest to the highest.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from upweight.evaluate import removal_curve
    >>> x = np.array([1.0, 2.0, 6.0, 7.0])
    >>> curve = removal_curve(x, lambda rows, seed: [x[rows].mean()], fractions=[0, 0.5])
    >>> plot_removal(curve, ax=Figure().add_subplot()).get_xlabel()
    'training rows removed'
    """
    kinds = frame["kind"].unique()
    if len(kinds) != 1:
        raise ValueError(f"frame must be of one kind of curve, got {len(kinds)}: {list(kinds)}")
    verb, which = str(kinds[0]).split("-")
    names = {"score": f"{which} scores first", "random": "in random order"}
    ax = axes(ax)
    _draw_by_order(ax, frame, "fraction", "output", names, band=True)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel(f"training rows {VERBS[verb]}")
    ax.set_ylabel(output)
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def plot_brittleness(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of right predictions that flip when their most helpful rows are removed.

    Parameters
    ----------
    frame
        From `brittleness`.
    ax
        Where to draw; the current pyplot axes by default.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from upweight.evaluate import brittleness
    >>> x = np.array([1.0, 1.0, 5.0, 7.0])
    >>> frame = brittleness([x], lambda rows, seed: [x[rows].mean() - 2], ks=[1, 2])
    >>> plot_brittleness(frame, Figure().add_subplot()).get_ylabel()
    'predictions flipped (1 test row)'
    """
    _some(frame["k"], "removal")
    names = {"score": "most helpful rows", "random": "random rows"}
    ax = axes(ax)
    _draw_by_order(ax, frame, "k", "flipped", names, band=False)
    tests = frame["test"].nunique()
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlabel("training rows removed for each test row")
    ax.set_ylabel(f"predictions flipped ({tests:,} test row{'s' * (tests != 1)})")
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def _draw_by_order(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, names: Mapping[str, str], *, band: bool
) -> None:
    """A line of the mean of y over x for each order of the rows, if wanted with its range."""
    for order, name in names.items():
        part = frame[frame["order"] == order]
        if part.empty:
            continue
        colour, dash, marker = STYLES[order]
        lines: Any = part.groupby(x)[y].agg(["mean", "min", "max"])
        at = lines.index.to_numpy()
        if band:
            ax.fill_between(at, lines["min"], lines["max"], color=colour, alpha=0.18, linewidth=0)
        mean = lines["mean"].to_numpy()
        ax.plot(at, mean, color=colour, linestyle=dash, marker=marker, markersize=4, label=name)


def _short_number(value: float, position: int | None = None) -> str:
    return f"{value:.12g}"


def _some(found: Sized, what: str) -> None:
    if len(found) == 0:
        raise ValueError(f"at least one {what} must be given, got none")
