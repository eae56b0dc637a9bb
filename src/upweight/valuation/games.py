"""Shapley values of the nearest-neighbour game of one query, for many queries at once.

Letters: K neighbours vote; N players, ranked r = 1, …, N from the nearest; L ≤ N of them are known.
The utility of a set S of players, whose α nearest to the query are α₁, α₂, …, is

    classification   u(S) = 1/K  Σ_{j ≤ min(K, |S|)} [y_{α_j} = t]
    regression       u(S) = -(1/K Σ_{j ≤ min(K, |S|)} y_{α_j} - t)²

with t the query's own label or number. The recursions are those of Jia et al., Efficient
task-specific data valuation for nearest neighbor algorithms, VLDB 2019, with min(K, r) and
min(K, N) where the paper supposes that there are more than K players.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["classification_game", "regression_game"]

Floats = NDArray[np.float64]


def classification_game(matches: NDArray[np.bool_], share: Floats, k: int, players: int) -> Floats:
    """(b, L) values of the L nearest players of b queries.

    Parameters
    ----------
    matches
        (b, L) m_r: whether the r-th nearest player has the query's label.
    share
        (b,) of all players that have it: used where L < N.
    k, players
        K and N.

    Notes
    -----
    s_N = m_N / max(N, K) and s_r = s_{r+1} + (m_r − m_{r+1}) min(K, r) / (K r), summed by parts:

        s_r = m_r / max(r, K) − Σ_{i > max(r, K)} m_i / (i (i − 1))

    For i > L the share stands for m_i, which leaves share · (1/L − 1/N) in place of that part of
    the sum: an error of less than 1/L. The others are then worth share / N each.
    """
    known = matches.shape[1]
    r = np.arange(1, known + 1)
    beyond = np.where(r > k, 1 / (r * np.maximum(r - 1, 1)), 0)
    after: Any = matches * beyond
    np.cumsum(after, axis=1, out=after)
    after -= after[:, -1:].copy()  # −Σ_{i > r}
    after += matches * (1 / np.maximum(r, k))
    if known < players:
        after -= (share * (1 / max(known, k) - 1 / max(players, k)))[:, None]
    return after


def regression_game(y: Floats, t: Floats, k: int, players: int) -> Floats:
    """(b, L) values of the L nearest players of b queries.

    Parameters
    ----------
    y
        (b, L) numbers of the players by rank, minus their mean over all.
    t
        (b,) numbers of the queries, minus the same.
    k, players
        K and N.

    Notes
    -----
    With a = min(K, i), b_l = min(K, l − 1) and q = min(K, N)

        s_N = −1/N [q (y_N / K)² − 2 q t y_N / K + q (q − 1) y_N mean_{l < N} y_l / K²]
        s_i = s_{i+1} + (y_{i+1} − y_i)/K · [a/i ((y_i + y_{i+1})/K − 2t)
              + 1/K (a (a − 1) / (i (i − 1)) Σ_{l < i} y_l
                     + Σ_{l > i+1} b_l (b_l − 1) / ((l − 1)(l − 2)) y_l)]

    Where L < N, players beyond L are taken to have the mean: y = 0. They are worth nothing.
    """
    b, known = y.shape
    t = t[:, None]
    if known < players:
        y = np.column_stack([y, np.zeros(b)])
        last = np.zeros((b, 1))
    else:
        last = _farthest(y, t, k)
    n = y.shape[1]
    if n == 1:
        return last
    i = np.arange(1, n)
    a = np.minimum(k, i)
    pairs = a * (a - 1) / np.maximum(i * (i - 1), 1)  # i = 1: no player before
    here, there = y[:, :-1], y[:, 1:]  # y_i, y_{i+1}
    before = np.cumsum(here, axis=1) - here  # Σ_{l < i}
    # b_l (b_l − 1) / ((l − 1)(l − 2)) is pairs at l − 1
    weighted = pairs * there
    behind = np.cumsum(weighted[:, ::-1], axis=1)[:, ::-1] - weighted  # Σ_{l > i+1}
    pulls = a / i * ((here + there) / k - 2 * t) + (pairs * before + behind) / k
    gains = (there - here) / k * pulls
    values = np.column_stack([gains, last])
    return np.cumsum(values[:, ::-1], axis=1)[:, ::-1][:, :known]


def _farthest(y: Floats, t: Floats, k: int) -> Floats:
    n = y.shape[1]
    q, last = min(k, n), y[:, -1:]
    others: Any = y[:, :-1].mean(axis=1, keepdims=True) if n > 1 else 0.0
    parts = q * (last / k) ** 2 - 2 * q * t * last / k + q * (q - 1) * last * others / k**2
    return -parts / n
