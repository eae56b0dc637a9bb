"""The smallest of many distances, with their places, in an order that nothing disturbs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["nearest_places"]

SAMPLED = 16  # every so-many-th distance is looked at to guess a threshold


def nearest_places(
    squares: NDArray[np.float64], wanted: int, shift: int, first: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The `wanted` smallest squared distances of every row, and where they are.

    Equal ones come in the order of their places on a ring that begins at `first`: first, first + 1,
    …, n − 1, 0, 1, …, first − 1. So they are preferred by turns, if `first` goes round.

    Parameters
    ----------
    squares
        (b, n) whole numbers below 2^(63 − shift).
    wanted
        At most n.
    shift
        2^shift ≥ n.
    first
        (b,) where the ring of each row begins, from 0 to n − 1.

    Returns
    -------
    squares, places : ndarray
        (b, wanted), nearest first.

    Notes
    -----
    What is sorted are whole numbers ``square · 2^shift + place``, which needs no array of indices.
    Where few are wanted, a threshold is taken from every 16th distance, so that about
    16 (2 + √(4 + wanted/16))² of them pass and, with four standard deviations to spare, the wanted
    ones are among them. Rows where that went wrong, mostly by ties, are done one by one.
    """
    n, mask = squares.shape[1], 2**shift - 1
    if n < 2048 or wanted * SAMPLED > n:
        keys = _keys(squares, np.arange(n) - first[:, None], shift)
        keys = _smallest(keys, wanted)
    else:
        keys = _few(squares, wanted, shift, first)
    return keys >> shift, ((keys & mask) + first[:, None]) & mask


def _few(
    squares: NDArray[np.float64], wanted: int, shift: int, first: NDArray[np.intp]
) -> NDArray[np.int64]:
    b, n = squares.shape
    rank = int(np.ceil((2 + np.sqrt(4 + wanted / SAMPLED)) ** 2))
    sample = squares[:, ::SAMPLED].copy()
    sample.partition(rank, axis=1)
    threshold = sample[:, rank].copy()
    passed = np.flatnonzero(squares <= threshold[:, None])
    row = passed // n
    sizes = np.bincount(row, minlength=b)
    fine = (sizes >= wanted) & (sizes <= 4 * SAMPLED * rank)
    if not fine.all():
        inside = fine[row]
        passed, row = passed[inside], row[inside]
        sizes = np.where(fine, sizes, 0)
    column = np.arange(len(passed)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found = np.full((b, max(wanted, int(sizes.max()))), np.iinfo(np.int64).max)
    found[row, column] = _keys(squares.ravel()[passed], passed - row * n - first[row], shift)
    for other in np.flatnonzero(~fine):
        chosen = _of_one_row(squares[other], float(threshold[other]), wanted, int(first[other]))
        keys = _keys(squares[other, chosen], chosen - first[other], shift)
        found[other, :wanted] = _smallest(keys[None], wanted)
    found.sort(axis=1)
    return found[:, :wanted]


def _of_one_row(
    squares: NDArray[np.float64], threshold: float, wanted: int, first: int
) -> NDArray[np.intp]:
    """All below the threshold and the first that equal it; all of them if that is not enough."""
    below = np.flatnonzero(squares < threshold)
    if len(below) >= wanted:
        return below
    equal = np.flatnonzero(squares == threshold)
    if len(below) + len(equal) < wanted:
        return np.arange(len(squares))
    on_ring = np.roll(equal, -int(np.searchsorted(equal, first)))
    return np.concatenate([below, on_ring[: wanted - len(below)]])


def _keys(squares: NDArray[np.float64], places: NDArray[np.intp], shift: int) -> NDArray[np.int64]:
    keys = squares.astype(np.int64)
    keys <<= shift
    places &= 2**shift - 1  # −1 becomes the last
    keys |= places
    return keys


def _smallest(keys: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    if 4 * wanted < keys.shape[1]:
        keys.partition(wanted - 1, axis=1)
        keys = keys[:, :wanted]
    keys.sort(axis=1)
    return keys if wanted == keys.shape[1] else keys[:, :wanted].copy()
