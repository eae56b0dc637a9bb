"""Squared distances that do not depend on how they were computed.

A matrix product in floating point rounds differently with every shape of a batch and number of
threads, so that rows at equal distances change places. Here rows are rounded to a grid on which
every product and every sum is a whole number below 2⁵³: then float64 is exact in any order, equal
rows are equally far, and ties are ties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Grid", "make_grid"]

FAR = 1024.0


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows that are asked about (queries) and rows to choose from (players), on one grid.

    Attributes
    ----------
    queries, players
        (m, d + 2) and (d + 2, n), so that their product is the squared distances in units of
        ``step``²: Σ (q − p)² = Σ −2 q p + |p|² · 1 + 1 · |q|².
    step
        Width of the grid.
    bits
        Squared distances are below 2^bits − 1.
    shift
        Bits of a position: 2^shift ≥ n.
    far_queries, far_players
        Rows that were drawn nearer, see `make_grid`: the product is wrong for them.
    """

    queries: NDArray[np.float64]
    players: NDArray[np.float64]
    step: float
    bits: int
    shift: int
    far_queries: NDArray[np.bool_]
    far_players: NDArray[np.bool_]


def make_grid(players: NDArray[Any], queries: NDArray[Any] | None = None) -> Grid:
    """A grid for the squared distances between two sets of rows (default: the players').

    Parameters
    ----------
    players, queries
        (n, d) and (m, d), finite.

    Returns
    -------
    Grid

    Notes
    -----
    With R the largest distance of a row from the centre (the median of every column) and
    b = min(53, 63 − ⌈log₂ n⌉), the step is a power of two of at most R · 2^(3 − b/2), which is
    7 · 10⁻⁷ R for 50,000 rows. Rows that are farther from the centre than 1,024 times the upper
    quartile of these distances are drawn to there, along the same direction, so that one absurd
    value does not coarsen the grid for all the others. They are then still farther from the others
    than these are from each other.
    """
    n = len(players)
    shift = max(1, (n - 1).bit_length())
    bits = min(53, 63 - shift)
    centre = np.median(players, axis=0).astype(np.float64)
    sides = [players] if queries is None else [players, queries]
    norms = [_norms(side, centre) for side in sides]
    some = norms[0][norms[0] > 0]
    cap = FAR * float(np.quantile(some, 0.75)) if len(some) else math.inf
    radius = min(cap, max(float(norm.max()) for norm in norms))
    # (2 radius / step)² < 2^bits - 1, with room for rounding
    exponent = 0 if radius == 0 else math.floor((bits - 2) / 2 - math.log2(radius))
    while True:
        on_grid = [
            _rounded(side, centre, norm, cap, exponent)
            for side, norm in zip(sides, norms, strict=True)
        ]
        squares = [np.einsum("ij,ij->i", side, side) for side in on_grid]
        if 4 * max(float(square.max()) for square in squares) < 2**bits - 1:
            break
        exponent -= 1
    far = [norm > cap for norm in norms]
    return Grid(
        np.column_stack([-2 * on_grid[-1], np.ones(len(sides[-1])), squares[-1]]),
        np.ascontiguousarray(np.column_stack([on_grid[0], squares[0], np.ones(n)]).T),
        math.ldexp(1.0, -exponent),
        bits,
        shift,
        far[-1],
        far[0],
    )


def _norms(rows: NDArray[Any], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        centred = 2 * (rows - centre)  # two rows are at most twice as far apart
        norms = np.sqrt(np.einsum("ij,ij->i", centred, centred)) / 2
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise ValueError(
            f"expected features whose squares are finite; row {row} has one of "
            f"{np.abs(rows[row]).max():g}: scale the columns first"
        )
    return norms


def _rounded(
    rows: NDArray[Any],
    centre: NDArray[np.float64],
    norms: NDArray[np.float64],
    cap: float,
    exponent: int,
) -> NDArray[np.float64]:
    # Rows and centre are rounded apart: features on a coarser grid, such as 0 and 1, stay exact.
    rounded = np.rint(np.ldexp(rows.astype(np.float64, copy=False), exponent))
    rounded -= np.rint(np.ldexp(centre, exponent))
    far = norms > cap
    if far.any():
        drawn = (rows[far] - centre) * (cap / norms[far])[:, None]
        rounded[far] = np.rint(np.ldexp(drawn, exponent))
    return rounded
