"""What plots are given, checked and made fit for a figure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, SupportsFloat

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

__all__ = ["class_positions", "finite_vector", "row_mask", "short_label"]


def short_label(text: object, limit: int = 24) -> str:
    """Text from data, fit for a figure: one line, not too long, and never read as mathematics."""
    # Cc, Cf: control characters, and marks that would turn the direction of the text around them.
    kept = "".join(
        c if c.isprintable() else " " for c in str(text) if unicodedata.category(c) != "Cf"
    )
    kept = " ".join(kept.split()) or "(empty)"
    if len(kept) > limit:
        tail = limit // 3  # the end of a name often tells it from the next one
        kept = f"{kept[: limit - tail - 1]}…{kept[-tail:]}"
    if matplotlib.rcParams["text.parse_math"]:
        kept = kept.replace("$", r"\$")
    return kept


def finite_vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Numbers (n,), n ≥ 1, all finite; else a ValueError that calls them `name`."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} must be a vector (n,) of at least one number, got shape {array.shape}"
        )
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise ValueError(
            f"{name} must be finite, got {array[wrong[0]]} at position {wrong[0]} "
            f"({wrong.size} of {array.size} are not finite)"
        )
    return array


def row_mask(marked: ArrayLike | None, n: int) -> NDArray[np.bool_]:
    """(n,) booleans from booleans or positions; None marks nothing."""
    mask = np.zeros(n, dtype=np.bool_)
    if marked is None:
        return mask
    given = np.asarray(marked)
    if given.dtype == np.bool_:
        if given.shape != (n,):
            raise ValueError(
                f"marked must have one boolean for each of the {n} rows, got shape {given.shape}"
            )
        return given
    if given.size == 0:
        return mask
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"marked must be ({n},) booleans or integer positions, "
            f"got shape {given.shape} of {given.dtype}"
        )
    # A 0/1 mask of integers would be taken for the rows 0 and 1: its repetitions give it away.
    if given.min() < 0 or given.max() >= n or len(np.unique(given)) != len(given):
        raise ValueError(
            f"marked positions must be distinct and between 0 and {n - 1}, "
            f"got {len(given)} from {given.min()} to {given.max()}; a mask must be of booleans"
        )
    mask[given] = True
    return mask


def class_positions(
    y_true: ArrayLike, y_pred: ArrayLike, labels: Sequence[Any] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp], list[str]]:
    """Class positions of both vectors, and the names to write beside them."""
    given, predicted = pd.Series(np.asarray(y_true)), pd.Series(np.asarray(y_pred))
    if len(given) != len(predicted) or given.empty:
        raise ValueError(
            "y_true and y_pred must have one label each for the same rows, "
            f"got {len(given)} and {len(predicted)} labels"
        )
    absent = np.flatnonzero(given.isna() | predicted.isna())
    if absent.size:
        raise ValueError(
            f"every row must have a given and a predicted label; row {absent[0]} lacks one"
        )
    found = set(given) | set(predicted)
    names = sorted(found, key=_sortable) if labels is None else list(labels)
    classes = names if found <= set(names) else range(len(names))
    position = {value: i for i, value in enumerate(classes)}
    unknown = [value for value in found if value not in position]
    if unknown:
        unknown = [value for value in unknown if value not in names] or unknown
        raise ValueError(
            f"labels must name every class, got {names!r:.200} "
            f"without {min(unknown, key=_sortable)!r}"
        )
    return (
        np.array([position[value] for value in given]),
        np.array([position[value] for value in predicted]),
        [short_label(name, limit=16) for name in names],
    )


def _sortable(value: object) -> tuple[bool, float, str]:
    if isinstance(value, SupportsFloat) and not isinstance(value, str):
        return (False, float(value), "")
    return (True, 0.0, str(value))
