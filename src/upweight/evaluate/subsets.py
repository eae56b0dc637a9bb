"""Subsets of training rows, as masks: True where the row is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["check_masks", "leave_out", "random_subsets"]


def random_subsets(n: int, count: int, *, share: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Random subsets of equal size, drawn without replacement.

    Parameters
    ----------
    n
        Training rows.
    count
        Subsets. More of them with the same seed begin with the same ones.
    share
        Each subset has exactly ``round(share * n)`` rows.
    seed
        Of the draw.

    Returns
    -------
    ndarray of bool (count, n)

    Raises
    ------
    ValueError
        If that leaves no row in a subset, or none out of it.

    Examples
    --------
    >>> masks = random_subsets(10, 3, share=0.3)
    >>> masks.shape, masks.sum(axis=1).tolist()
    ((3, 10), [3, 3, 3])
    """
    _at_least_one(n=n, count=count)
    size = round(share * n)
    if not 0 < size < n:
        raise ValueError(
            f"expected a share that leaves some of the {n} rows in and some out; got {share}, "
            f"which is {size} rows"
        )
    return _draw(n, count, size, seed)


def leave_out(n: int, k: int = 1, count: int | None = None, seed: int = 0) -> NDArray[np.bool_]:
    """Subsets that lack k rows.

    Parameters
    ----------
    n
        Training rows.
    k
        Rows to leave out at a time.
    count
        Subsets. For ``k=1`` the default is all n of them, the i-th without row i, and a smaller
        count takes that many different rows at random. For larger k the sets are random.
    seed
        Of the draw.

    Returns
    -------
    ndarray of bool (count, n)

    Raises
    ------
    ValueError
        If k is not between 1 and n - 1, if more than n single rows are asked for, or if a larger k
        comes without a count.

    Examples
    --------
    >>> leave_out(3).astype(int)
    array([[0, 1, 1],
           [1, 0, 1],
           [1, 1, 0]])
    >>> (~leave_out(10, k=2, count=4)).sum(axis=1).tolist()
    [2, 2, 2, 2]
    """
    _at_least_one(n=n, k=k, count=1 if count is None else count)
    if k >= n:
        raise ValueError(f"expected to leave out fewer than all {n} rows; got k = {k}")
    if k > 1:
        if count is None:
            raise ValueError(f"expected a count of the sets of {k} rows to draw; got None")
        return ~_draw(n, count, k, seed)
    if count is None:
        return ~np.eye(n, dtype=np.bool_)
    if count > n:
        raise ValueError(f"expected at most {n} single rows to leave out; got a count of {count}")
    rows = np.random.default_rng(seed).choice(n, size=count, replace=False)
    return rows[:, None] != np.arange(n)


def check_masks(masks: ArrayLike, n: int | None = None) -> NDArray[np.bool_]:
    """Masks of training rows as booleans (S, n), or a ValueError that says what is wrong.

    Parameters
    ----------
    masks
        (S, n) booleans, or numbers 0 and 1.
    n
        Training rows there should be; None takes what comes.

    Raises
    ------
    ValueError
        If the shape is another one, a value is neither 0 nor 1, or a subset has no rows.

    Examples
    --------
    >>> check_masks([[0, 1], [1, 1]])
    array([[False,  True],
           [ True,  True]])
    >>> check_masks([[0, 2]])
    Traceback (most recent call last):
    ...
    ValueError: expected masks of booleans, True where the row is trained on; got the value 2
    """
    given = np.asarray(masks)
    wanted = "(S, n)" if n is None else f"(S, {n})"
    if given.ndim != 2 or 0 in given.shape or (n is not None and given.shape[1] != n):
        raise ValueError(
            f"expected masks of shape {wanted}, a row for each subset; got {given.shape}"
        )
    if given.dtype.kind not in "biuf":
        raise ValueError(f"expected masks of booleans; got {given.dtype}")
    other = given[(given != 0) & (given != 1)]
    if other.size:
        raise ValueError(
            "expected masks of booleans, True where the row is trained on; got the value "
            f"{other[0]}"
        )
    checked = given.astype(np.bool_)
    empty = np.flatnonzero(~checked.any(axis=1))
    if empty.size:
        raise ValueError(f"expected at least one row in every subset; subset {empty[0]} has none")
    return checked


def _draw(n: int, count: int, size: int, seed: int) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, n), dtype=np.bool_)
    for mask in masks:
        mask[rng.choice(n, size=size, replace=False)] = True
    return masks


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"expected {name} of at least 1; got {number}")
