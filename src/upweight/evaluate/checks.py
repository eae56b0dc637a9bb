"""What the functions of this package are given, checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["check_confidence", "finite_array"]


def finite_array(values: ArrayLike, name: str, shape: tuple[int | str, ...]) -> NDArray[np.float64]:
    """Finite numbers of a shape, where letters stand for any size ≥ 1; else a ValueError."""
    array = np.asarray(values, dtype=np.float64)
    fits = array.ndim == len(shape) and all(
        got == wanted if isinstance(wanted, int) else got > 0
        for got, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"expected {name} of shape ({wanted}); got {array.shape}")
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        at = place[0] if len(place) == 1 else place
        raise ValueError(
            f"expected finite {name}; got {array[place]} at position {at} "
            f"({len(wrong)} of {array.size} are not finite)"
        )
    return array


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, such as 0.95; got {confidence}")
