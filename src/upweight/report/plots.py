"""Plots of scores. Every axis says what the number means and which way is harmful.

A score is positive where the training row helps (up-weighting it lowers the test loss) and negative
where it harms. The functions take plain arrays and draw on ``ax``, or on the current pyplot axes.

Colours are those of :mod:`upweight.report.style`. Text keeps matplotlib's own colour, so that a
dark style works too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from upweight.report.inputs import class_positions, finite_vector, row_mask, short_label
from upweight.report.style import (
    BLUE,
    DASHES,
    DIRECTION,
    GREY,
    MAX_VECTORS,
    RED,
    SERIES,
    axes,
    legend_above,
    tidy,
)

__all__ = [
    "draw",
    "plot_confusion",
    "plot_feature_influence",
    "plot_losses",
    "plot_method_comparison",
    "plot_score_distribution",
    "report_style",
]

MAX_BINS = 60


@contextmanager
def report_style() -> Generator[None]:
    """Context with matplotlib's default settings, whatever the user's own configuration says.

    A report must look the same on every machine, and :mod:`upweight.report.page` recognises the
    default black as the colour of text, which it adapts to light and dark.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 10.0, "axes.titlesize": 10.0})
        yield


def draw(
    plot: Callable[..., Axes],
    *args: Any,
    width: float = 5.0,
    height: float = 3.4,
    **kwargs: Any,
) -> Figure:
    """Draw one plot on a figure of its own, sized for a report.

    Parameters
    ----------
    plot
        A function of this module, or any other that takes ``ax``.
    *args, **kwargs
        Passed on to ``plot``.
    width, height
        In inches. On a telephone a figure of 5 inches keeps its 10-point text at 9 pixels.

    Returns
    -------
    Figure
        Known to no pyplot state, so that nothing has to be closed.

    Examples
    --------
    >>> figure = draw(plot_score_distribution, [0.5, -0.1, 0.7], marked=[1])
    >>> figure.axes[0].get_ylabel()
    'training rows (log scale)'
    """
    with report_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        plot(*args, ax=figure.add_subplot(), **kwargs)
    return figure


def plot_losses(losses: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss by epoch, one line for each column.

    Parameters
    ----------
    losses
        Indexed by epoch, with columns such as ``train`` and ``validation``: mean losses per row.
        Missing values (an epoch without validation) are bridged.
    ax
        Where to draw; the current pyplot axes by default.
    """
    if losses.empty:
        raise ValueError(
            f"losses must have at least one epoch and one column, got shape {losses.shape}"
        )
    ax = axes(ax)
    for j in range(losses.shape[1]):
        line = losses.iloc[:, j].astype(float).dropna()
        ax.plot(
            line.index.to_numpy(),
            line.to_numpy(),
            color=SERIES[j % len(SERIES)],
            linestyle=DASHES[j % len(DASHES)],
            linewidth=1.8,
            label=short_label(losses.columns[j]),
        )
    ax.set_xlabel("epoch")
    ax.set_ylabel("mean loss per row (lower is better)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    legend_above(ax)
    tidy(ax, grid="y")
    return ax


def plot_confusion(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    labels: Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Counts of given against predicted labels, written into the cells.

    Parameters
    ----------
    y_true, y_pred
        (n,) the given and the predicted label of each row: strings, integers or booleans.
    labels
        The classes in the order wanted; or, where ``y_true`` and ``y_pred`` hold the integers
        0 … k-1, the k names of the classes. By default all classes that occur, sorted.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    The tint (blue where both agree, red where not) only underlines the count: it is faint enough
    for the text colour of the figure to be read on it, whether that is black or white.
    """
    given, predicted, names = class_positions(y_true, y_pred, labels)
    k = len(names)
    counts = np.zeros((k, k), dtype=np.int64)
    np.add.at(counts, (given, predicted), 1)

    ax = axes(ax)
    size = float(np.clip(120 / k, 5, 11))
    for i in range(k):
        for j in range(k):
            colour, count = BLUE if i == j else RED, int(counts[i, j])
            alpha = 0.04 + 0.3 * count / counts.max() if count else 0.0
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour, alpha=alpha, lw=0))
            ax.text(
                j, i, f"{count:,}", ha="center", va="center", size=size, alpha=1 if count else 0.5
            )
    ax.set_xlim(-0.5, k - 0.5)
    ax.set_ylim(k - 0.5, -0.5)  # downwards, as a matrix is read
    turned = k * max(len(name) for name in names) > 40
    ax.set_xticks(
        range(k),
        names,
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor" if turned else "default",
    )
    ax.set_yticks(range(k), names)
    ax.set_xlabel("predicted label")
    ax.set_ylabel("given label")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_color(GREY)
    return ax


def plot_score_distribution(
    scores: ArrayLike,
    marked: ArrayLike | None = None,
    marked_label: str = "flipped label",
    ax: Axes | None = None,
    bins: int | Sequence[float] | str = "auto",
) -> Axes:
    """Histogram of one score per training row, with some rows in a second colour.

    Parameters
    ----------
    scores
        (n,) positive = the row helps (up-weighting it lowers the test loss), negative = it harms.
    marked
        Which rows are special, for instance known to be corrupted: (n,) booleans, or positions.
    marked_label
        What the marked rows are, for the legend.
    ax
        Where to draw; the current pyplot axes by default.
    bins
        As in ``numpy.histogram_bin_edges``. With ``"auto"`` no bin lies on both sides of zero.

    Notes
    -----
    The counts are on a log axis: a handful of bad rows stays visible beside thousands of good ones.
    """
    values = finite_vector(scores, "scores")
    mask = row_mask(marked, len(values))
    edges = _edges(values) if isinstance(bins, str) and bins == "auto" else bins
    edges = np.histogram_bin_edges(values, edges)

    ax = axes(ax)
    tallest = 1.0
    for part, colour, name in ((~mask, BLUE, "other rows"), (mask, RED, short_label(marked_label))):
        if marked is None:
            name = "training rows"
        if not part.any():
            continue
        tallies, _, _ = ax.hist(
            values[part],
            bins=edges.tolist(),
            color=colour,
            alpha=0.65,
            log=True,
            label=f"{name} ({part.sum():,})",
        )
        tallest = max(tallest, float(np.max(np.asarray(tallies))))
    ax.axvline(0, color=GREY, linewidth=1.2, linestyle="--", zorder=3)
    ax.set_ylim(0.6, tallest * 1.3)  # from below one, so that a bar of one row can be seen
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if tallest < 200 else (1,), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(_count))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(f"influence on the test rows: {DIRECTION}")
    ax.set_ylabel("training rows (log scale)")
    if marked is not None:
        legend_above(ax)
    tidy(ax, grid="y")
    return ax


def plot_feature_influence(
    values: ArrayLike,
    feature_names: Sequence[Any],
    ax: Axes | None = None,
    top: int | None = None,
) -> Axes:
    """Mean influence of each feature as horizontal bars, the strongest on top.

    Parameters
    ----------
    values
        (d,) for each feature, the mean over training and test rows of the perturbation-mode
        influence: the fall of the test loss per unit by which the (scaled) feature of a training
        row rises. Positive = increasing this feature in the training rows helps on average.
    feature_names
        The d names.
    ax
        Where to draw; the current pyplot axes by default.
    top
        Show only that many features, the strongest in either direction.
    """
    bars = finite_vector(values, "values")
    if len(feature_names) != len(bars):
        raise ValueError(
            f"feature_names must have one name for each of the {len(bars)} values, "
            f"got {len(feature_names)} names"
        )
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, or None for all features; got {top}")
    order = np.argsort(-np.abs(bars), kind="stable")[:top]
    bars, names = bars[order], [short_label(feature_names[i]) for i in order]

    ax = axes(ax)
    position = np.arange(len(bars))
    colours = [RED if bar < 0 else BLUE for bar in bars]
    ax.barh(position, bars, color=colours, alpha=0.85, height=0.7)
    ax.axvline(0, color=GREY, linewidth=1.2)
    ax.set_yticks(position, names)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    # Flush right: long names leave less room than the label needs, and it may grow to the left.
    ax.set_xlabel(f"raising the feature is: {DIRECTION}", loc="right")
    ax.tick_params(axis="y", length=0)
    tidy(ax, grid="x")
    ax.spines["left"].set_visible(False)
    return ax


def plot_method_comparison(
    reference: ArrayLike,
    approximate: ArrayLike,
    marked: ArrayLike | None = None,
    ax: Axes | None = None,
    name: str = "approximate",
) -> Axes:
    """Scores of one method against those of a reference, with both correlations.

    Parameters
    ----------
    reference, approximate
        (n,) the score of each training row by the exact and by the other method;
        positive = the row helps, negative = it harms.
    marked
        Rows to circle in red: (n,) booleans, or positions.
    ax
        Where to draw; the current pyplot axes by default.
    name
        Of the other method, for its axis.

    Notes
    -----
    On the dashed line both agree. Pearson's r compares the values and Spearman's ρ the ranks only;
    neither notices a common factor, the line does.
    """
    x, y = finite_vector(reference, "reference"), finite_vector(approximate, "approximate")
    if len(x) != len(y):
        raise ValueError(
            f"reference and approximate must score the same rows, got {len(x)} and {len(y)} scores"
        )
    mask = row_mask(marked, len(x))

    ax = axes(ax)
    ax.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    many = len(x) > MAX_VECTORS
    ax.scatter(x, y, s=16, color=BLUE, alpha=0.6, linewidths=0, rasterized=many)
    if marked is not None:
        ax.scatter(x[mask], y[mask], s=60, facecolors="none", edgecolors=RED, linewidths=1.5)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.06 * (high - low) or 1.0
    ax.set_xlim(low - margin, high + margin)
    ax.set_ylim(low - margin, high + margin)
    pearson, spearman = _correlation(x, y), _correlation(_ranks(x), _ranks(y))
    # Two texts, because a browser's narrower font would shift the lines of one against each other.
    for line, text in enumerate((f"Pearson r = {pearson}", f"Spearman ρ = {spearman}")):
        ax.text(0.03, 0.96 - 0.08 * line, text, transform=ax.transAxes, va="top", zorder=4)
    ax.set_xlabel(f"reference influence: {DIRECTION}")
    ax.set_ylabel(f"{short_label(name, limit=16)}: {DIRECTION}")
    tidy(ax, grid="both")
    return ax


def _count(value: float, position: int | None = None) -> str:
    return f"{value:,.0f}"


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Freedman-Diaconis bins with an edge at zero, some `MAX_BINS` of them at most.

    numpy's own "auto" makes millions of bins when one row is far from all others.
    """
    spread = float(np.ptp(values))
    if spread == 0:
        spread = abs(float(values[0])) or 1.0
    q25, q75 = np.quantile(values, [0.25, 0.75])
    width = 2 * float(q75 - q25) / len(values) ** (1 / 3)
    width = float(np.clip(width, spread / MAX_BINS, spread / 12))
    first = np.floor(values.min() / width)
    last = max(np.ceil(values.max() / width), first + 1)
    edges = np.arange(first, last + 1) * width
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())  # round-off
    return edges


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return pd.Series(values).rank().to_numpy(dtype=np.float64)


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return "undefined"
    return f"{np.corrcoef(x, y)[0, 1]:.3f}"
