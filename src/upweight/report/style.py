"""The colours of all plots, and what every plot does with its axes.

Colours are Paul Tol's *vibrant* scheme, which colour-blind readers tell apart, in tones that stand
out from a light and from a dark background.
"""

from __future__ import annotations

from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "DASHES",
    "DIRECTION",
    "GREY",
    "MAX_VECTORS",
    "ORANGE",
    "PURPLE",
    "RED",
    "SERIES",
    "TEAL",
    "axes",
    "legend_above",
    "tidy",
]

BLUE = "#0077bb"  # rows, what helps
RED = "#cc3311"  # marked rows, what harms
ORANGE = "#dd6611"  # darker than Tol's #ee7733, which is faint on white
TEAL = "#009988"
PURPLE = "#aa4499"
GREY = "#888888"  # lines that carry no data: grid, zero, identity
SERIES = (BLUE, ORANGE, TEAL, PURPLE)
DASHES = ("-", "--", "-.", ":")

DIRECTION = "harmful ← 0 → helpful"
MAX_VECTORS = 5_000  # more points than this become a picture inside the SVG, which stays small


def axes(ax: Axes | None) -> Axes:
    """The axes given, or the current pyplot axes."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # only here: pyplot decides on a backend when it is imported

    return plt.gca()


def tidy(ax: Axes, grid: str) -> None:
    """Two spines only, and a faint grid along ``"x"``, ``"y"`` or ``"both"`` under the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(visible=True, axis=grid, color=GREY, alpha=0.3, linewidth=0.8)  # pyright: ignore[reportArgumentType]


def legend_above(ax: Axes) -> None:
    """Over the axes, where it covers no data: in a row if that is not too long."""
    _, names = ax.get_legend_handles_labels()
    in_a_row = sum(len(name) + 6 for name in names) < 54
    ax.legend(
        frameon=False,
        ncols=len(names) if in_a_row else 1,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderpad=0,
        borderaxespad=0.6,
    )
