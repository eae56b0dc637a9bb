"""What leaving out rows does, by leaving them out and training again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.evaluate.retrain import Refit, RetrainOptions, mean_over_seeds, retrain
from upweight.evaluate.subsets import leave_out

__all__ = ["actual_effects", "leave_one_out"]


def leave_one_out(
    refit: Refit, n: int, *, higher_is_better: bool = True, **options: Unpack[RetrainOptions]
) -> NDArray[np.float64]:
    """What each training row does for each test row: n + 1 trainings.

        effect[i, j] = output_j(all rows) - output_j(all but row i)

    Parameters
    ----------
    refit
        As for `retrain`.
    n
        Training rows.
    higher_is_better
        Of the outputs: True for margins. For losses, False, the effect has the other sign, so that
        it is positive where the row helps.
    **options
        For `retrain`. The protocol is "fixed-seed" unless another is given. Differences are taken
        seed by seed and then averaged. With many seeds this truth becomes clear; with one, the
        noise of training may be larger than what a row does.

    Returns
    -------
    ndarray (n, m)
        Transposed it has the shape of scores. NaN where every run without the row failed.

    Raises
    ------
    RuntimeError
        If no run on all rows worked.

    References
    ----------
    Koh & Liang, Understanding black-box predictions via influence functions, ICML 2017, §4.1.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 6.0])
    >>> leave_one_out(lambda rows, seed: [x[rows].mean()], 3)
    array([[-1. ],
           [-0.5],
           [ 1.5]])
    """
    return _effects(refit, leave_out(n), higher_is_better, options)


def actual_effects(
    refit: Refit,
    n: int,
    groups: Sequence[ArrayLike],
    *,
    higher_is_better: bool = True,
    **options: Unpack[RetrainOptions],
) -> NDArray[np.float64]:
    """What groups of training rows do for each test row.

        effect[g, j] = output_j(all rows) - output_j(all rows but those of group g)

    Parameters
    ----------
    refit
        As for `retrain`.
    n
        Training rows.
    groups
        G groups: positions of rows, or (n,) booleans.
    higher_is_better, **options
        As for `leave_one_out`.

    Returns
    -------
    ndarray (G, m)
        Positive where the group helps; NaN where every run without it failed.

    Raises
    ------
    ValueError
        If a group is empty, takes all rows, or names rows that are not there.
    RuntimeError
        If no run on all rows worked.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 6.0])
    >>> actual_effects(lambda rows, seed: [x[rows].mean()], 3, [[0, 1], [2]])
    array([[-3. ],
           [ 1.5]])
    """
    if len(groups) == 0:
        raise ValueError("expected at least one group of rows; got none")
    kept = np.array([_without(group, n, g) for g, group in enumerate(groups)])
    return _effects(refit, kept, higher_is_better, options)


def _without(group: ArrayLike, n: int, number: int) -> NDArray[np.bool_]:
    """(n,) the rows that are not in a group."""
    rows = np.asarray(group)
    if rows.dtype == np.bool_ and rows.shape == (n,):
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
        raise ValueError(
            f"expected group {number} as positions of rows or ({n},) booleans, with at least one "
            f"row; got shape {rows.shape} of {rows.dtype}"
        )
    if rows.min() < 0 or rows.max() >= n:
        raise ValueError(
            f"expected positions from 0 to {n - 1} in group {number}; got {rows.min()} to "
            f"{rows.max()}"
        )
    kept = np.ones(n, dtype=np.bool_)
    kept[rows] = False
    if not kept.any():
        raise ValueError(f"expected group {number} to leave some row to train on; it has all {n}")
    return kept


def _effects(
    refit: Refit, kept: NDArray[np.bool_], higher_is_better: bool, options: RetrainOptions
) -> NDArray[np.float64]:
    settings: RetrainOptions = {"protocol": "fixed-seed", **options}
    everything = np.ones((1, kept.shape[1]), dtype=np.bool_)
    outputs = retrain(refit, np.concatenate([everything, kept]), **settings).outputs
    if np.isnan(outputs[0]).all():
        raise RuntimeError("no run on all rows worked, so there is nothing to compare with")
    change = mean_over_seeds(outputs[:1] - outputs[1:])  # (G, m)
    return change if higher_is_better else -change
