"""Influence against KNN-Shapley values of the rows of an audit, as a plot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from upweight.report.inputs import finite_vector, row_mask, short_label
from upweight.report.style import BLUE, DIRECTION, GREY, RED, axes, legend_above, tidy

__all__ = ["MANY", "plot_influence_and_values", "spearman"]

Floats = NDArray[np.float64]

FEWEST = 3  # rows with a correlation
MOST_NAMED = 5  # points
MANY = 600  # a point takes 100 bytes of a page that is full: of more, not each is drawn
CELLS, FLAGS = (100, 64), (30, 20)  # of the grids, along x and y
SHADES = (0.45, 0.65, 0.85, 1.0)  # opacity of a cell with one row, up to 10, up to 100, more
WIDE, HIGH = 0.2, 0.03  # of a name, as a share of the axes


def plot_influence_and_values(
    influence: ArrayLike,
    values: ArrayLike,
    flagged: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """KNN-Shapley values against influences, flagged rows as red diamonds, outliers with names.

    Parameters
    ----------
    influence, values
        (n,) of each row: positive helps.
    flagged
        Rows with a label flag: (n,) booleans, or positions.
    names
        (n,) of the rows; None names no point.
    ax
        Where to draw; the current pyplot axes by default.

    Notes
    -----
    A few influences are far larger than all others. The axis is linear up to the influence that
    three quarters of the rows do not exceed, and logarithmic beyond it. Of more than 600 rows
    without a flag the cells of a grid are shown, the stronger the more rows (up to 1, 10, 100, or
    more); of more than 600 flagged rows one diamond where several would cover each other.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_influence_and_values([-1, 2, 3], [-0.1, 0.2, 0.1], [0], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['not flagged (2)', 'flagged (1)', "Spearman's r = +0.50"]
    """
    x, y = finite_vector(influence, "influence"), finite_vector(values, "values")
    if len(x) != len(y) or (names is not None and len(names) != len(x)):
        told = f"{len(x)} influences, {len(y)} values"
        told += "" if names is None else f", {len(names)} names"
        raise ValueError(f"expected one influence, value and name for each row; got {told}")
    mask = row_mask(flagged, len(x))
    width = float(np.quantile(np.abs(x), 0.75)) or float(np.abs(x).max()) or 1.0
    ax = axes(ax)
    ax.set_xscale("asinh", linear_width=width)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.axvline(0, color=GREY, linewidth=1)
    stretched = np.arcsinh(x / width)
    for part, colour, marker, name in (
        (~mask, BLUE, "o", "not flagged"),
        (mask, RED, "D", "flagged"),
    ):
        if not part.any():
            continue
        many, shown = bool(part.sum() > MANY), np.flatnonzero(part)
        if many and colour == BLUE:
            _shades(ax, x[part], y[part], width)
            shown = shown[:0]
        elif many:
            shown = shown[_first_of_cells(stretched[part], y[part], FLAGS)]
        ax.scatter(
            x[shown],
            y[shown],
            s=14 if colour == BLUE else 28,
            color=colour,
            marker=marker,
            alpha=0.4 if colour == BLUE else 1.0 if many else 0.85,
            linewidths=0,
            label=f"{name} ({part.sum():,})",
        )
    r = spearman([x, y])[0, 1]
    if np.isfinite(r):
        ax.plot([], [], " ", label=f"Spearman's r = {r:+.2f}")
    if names is not None:
        _name_outliers(ax, stretched, x, y, names)
    _stretched_ticks(ax, width, float(np.abs(x).max()))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.set_xlabel(f"influence: {DIRECTION} (stretched near 0)")
    ax.set_ylabel("KNN-Shapley value: misleads ← 0 → helps", fontsize=9)
    legend_above(ax)
    tidy(ax, grid="both")
    return ax


def _shades(ax: Axes, x: Floats, y: Floats, width: float) -> None:
    """Cells of a grid with rows in them, the stronger the more."""
    edges = [
        np.linspace(part.min(), part.max() + (float(np.ptp(part)) == 0), count + 1)
        for part, count in zip((np.arcsinh(x / width), y), CELLS, strict=True)
    ]
    counts, _, _ = np.histogram2d(np.arcsinh(x / width), y, bins=edges)
    levels = np.searchsorted([1.0, 10.0, 100.0], counts.T)
    ax.pcolormesh(
        width * np.sinh(edges[0]),
        edges[1],
        np.ma.masked_array(levels, counts.T == 0),
        cmap=ListedColormap([to_rgba(BLUE, shade) for shade in SHADES]),
        vmin=0,
        vmax=len(SHADES),
        rasterized=True,
    )


def _first_of_cells(x: Floats, y: Floats, cells: tuple[int, int]) -> NDArray[np.intp]:
    """Positions of the first point in each cell of a grid."""
    along, across = (
        np.minimum((_unit(part) * count).astype(np.intp), count - 1)
        for part, count in zip((x, y), cells, strict=True)
    )
    return np.sort(np.unique(along * cells[1] + across, return_index=True)[1])


def spearman(columns: Sequence[Floats]) -> Floats:
    """(m, m) Spearman's r between m columns of numbers; not a number where one is constant.

    Examples
    --------
    >>> float(spearman([np.array([1.0, 2.0, 3.0]), np.array([5.0, 9.0, 7.0])])[0, 1])
    0.5
    """
    frame = pd.DataFrame(dict(enumerate(columns)))
    return frame.corr("spearman", min_periods=FEWEST).to_numpy(dtype=np.float64)


def _name_outliers(ax: Axes, stretched: Floats, x: Floats, y: Floats, names: Sequence[str]) -> None:
    """Names beside the points farthest from the middle, as far as they do not overlap."""
    places = np.stack([_unit(stretched), _unit(y)], axis=1)
    far = np.abs(np.stack([_away(stretched), _away(y)])).max(axis=0)
    taken: list[NDArray[np.float64]] = []
    for i in np.argsort(-far, kind="stable")[: 4 * MOST_NAMED]:
        place = places[i]
        if any(abs(place[0] - x0) < 0.3 and abs(place[1] - y0) < 0.07 for x0, y0 in taken):
            continue
        left = _crowd(places, place, -1) < _crowd(places, place, 1)
        ax.annotate(
            short_label(names[i], limit=16),
            (x[i], y[i]),
            xytext=(-5 if left else 5, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
        )
        taken.append(place)
        if len(taken) == MOST_NAMED:
            return


def _crowd(places: NDArray[np.float64], place: NDArray[np.float64], side: int) -> float:
    """How many points a name on this side would cover; none has room beyond the axes."""
    if not 0 <= place[0] + side * WIDE <= 1:
        return np.inf
    along, across = side * (places[:, 0] - place[0]), np.abs(places[:, 1] - place[1])
    return float(((along > 0) & (along < WIDE) & (across < HIGH)).sum())


def _stretched_ticks(ax: Axes, width: float, largest: float) -> None:
    """0 and two round numbers on each side, evenly spaced, within the limits of the axis."""
    low, high = ax.get_xlim()
    end = np.arcsinh(largest / width)
    ticks = [0.0]
    for part in (0.5, 1.0):
        value = width * np.sinh(part * end)
        if value > 0:
            power = 10.0 ** np.floor(np.log10(value))
            ticks += [sign * float(np.floor(value / power) * power) for sign in (-1, 1)]
    ticks = sorted({tick for tick in ticks if low <= tick <= high})
    ax.set_xticks(ticks, [f"{tick:.3g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(low, high)


def _unit(values: Floats) -> Floats:
    """Within [0, 1]."""
    return (values - values.min()) / (float(np.ptp(values)) or 1.0)


def _away(values: Floats) -> Floats:
    """Distance from the median, in median distances."""
    away = np.abs(values - np.median(values))
    return away / (float(np.median(away)) or float(away.max()) or 1.0)
