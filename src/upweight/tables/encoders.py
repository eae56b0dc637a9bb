"""One column → features, on a scale on which columns of all kinds weigh about the same.

The mean squared distance of two rows in the features of a column is about 2, as it is for a number
that is normally distributed with variance 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.tables.cells import Encoded, natural

__all__ = ["Part", "categories", "dates", "messy", "numbers", "strings", "switch", "texts"]

LEAST_DIFFERENT = 0.1  # so that a rare value does not become a huge distance
BOUND = 4.0
NORMAL_IQR = 1.349  # interquartile range of the standard normal distribution
SKEWED = 0.4
DIMENSIONS = 20
WORDS = 20_000
FITTED_TEXTS = 100_000
MESSY = 0.2


@dataclass(frozen=True, eq=False)
class Part:
    """Features of a column, written when there is a place for them.

    Attributes
    ----------
    names
        One per feature.
    write
        Fills an array of shape (n, features).
    """

    names: list[str]
    write: Callable[[np.ndarray], None]


def numbers(name: str, values: np.ndarray, *, log: bool = True) -> Iterator[Part]:
    """u = v / √(1 + (v/4)²) of v = (x − median) / scale, missing values at the median.

    The scale is the interquartile range / 1.349, or the standard deviation where that range is 0.
    So u is about v for usual values, and never beyond ±4: no error of units can outweigh all other
    columns. Numbers ≥ 0 that are strongly skewed to the right are taken as log(1 + x/q) before, q
    the lower quartile of those above 0: if (q₈₇.₅ + q₁₂.₅ − 2 median) / (q₈₇.₅ − q₁₂.₅) exceeds
    0.4, and becomes less than half as much. An eighth of the values may be wrong without moving
    these quantiles far.
    """
    present = values[~np.isnan(values)]
    if len(present) == 0:
        return
    unit = _log_unit(present) if log else None
    if unit is not None:
        present = np.log1p(present / unit)
    low, middle, high = np.percentile(present, [25, 50, 75])
    scale = (high - low) / NORMAL_IQR or float(present.std())
    if not scale > 0:
        return

    def write(out: np.ndarray) -> None:
        v = values if unit is None else np.log1p(values / unit)
        v = (v - middle) / scale
        np.nan_to_num(v, copy=False, nan=0.0)
        out[:, 0] = v / np.hypot(1.0, v / BOUND)

    yield Part([name if unit is None else f"log({name})"], write)


def switch(name: str, values: np.ndarray) -> Iterator[Part]:
    """0 and 1 → (x − p) √(2 / max(g, 0.1)), with p the mean and g = 2p(1 − p); missing → 0."""
    p = float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
    scale = np.sqrt(2 / max(2 * p * (1 - p), LEAST_DIFFERENT))
    if 0 < p < 1:

        def write(out: np.ndarray) -> None:
            out[:, 0] = np.nan_to_num((values - p) * scale, nan=0.0)

        yield Part([name], write)


def dates(name: str, days: np.ndarray) -> Iterator[Part]:
    """Days as `numbers` without the logarithm; month and weekday on circles of radius √½.

    Month and weekday are there only where they differ between rows.
    """
    yield from numbers(name, days, log=False)
    present = ~np.isnan(days)
    whole = np.floor(days[present]).astype(np.int64)
    months = whole.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) % 12
    for what, values, period in (("month", months, 12), ("weekday", (whole + 3) % 7, 7)):
        if len(np.unique(values)) > 1:
            names = [f"{name} {what} {function}" for function in ("sin", "cos")]
            yield Part(names, _circle(values, period, present))


def categories(name: str, encoded: Encoded, most: int) -> Iterator[Part]:
    """One feature per level, 1 / √max(g, 0.1) in its rows and else 0; g = 1 − Σ p².

    At most `most` levels, the commonest (by alphabet where they tie); the others share ``(other)``,
    and missing values are the level ``(missing)``.
    """
    order = np.lexsort((np.arange(len(encoded.levels)), -encoded.counts))
    kept = sorted(order[:most].tolist(), key=lambda at: natural(str(encoded.levels[at])))
    labels = [str(encoded.levels[at]) for at in kept]
    place = np.full(len(encoded.levels), len(labels))
    place[kept] = np.arange(len(kept))
    labels += ["(other)"] if len(encoded.levels) > most else []
    groups = encoded.spread(place, len(labels))
    labels += ["(missing)"] if (encoded.codes < 0).any() else []
    shares = np.bincount(groups, minlength=len(labels)) / len(groups)
    scale = 1 / np.sqrt(max(1 - float(np.square(shares).sum()), LEAST_DIFFERENT))

    def write(out: np.ndarray) -> None:
        out[:] = 0
        out[np.arange(len(groups)), groups] = scale

    if len(labels) > 1:
        yield Part([f"{name}={label}" for label in labels], write)


def messy(encoded: Encoded, most: int) -> bool:
    """Whether so many levels are rare that more than a fifth of the cells would be ``(other)``."""
    common = int(np.sort(encoded.counts)[::-1][:most].sum())
    return encoded.present - common > MESSY * encoded.present


def strings(name: str, encoded: Encoded, seed: int) -> Iterator[Part] | None:
    """Similar spellings as near points, by skrub's `StringEncoder`; None if it is not installed."""
    try:
        from skrub import StringEncoder
    except ImportError:
        return None
    import pandas as pd

    levels = pd.Series(encoded.levels, name=name, dtype=object).astype("str")
    size = min(DIMENSIONS, max(1, len(levels) - 1))
    encoder: Any = StringEncoder(n_components=size, random_state=seed)
    encoder.fit(levels.iloc[_fitted(len(levels), seed)])
    return _embedded(name, encoded, encoder.transform(levels).to_numpy())


def texts(name: str, encoded: Encoded, seed: int) -> Iterator[Part]:
    """The first 20 singular directions of the weights of words (TF-IDF), of total variance 1.

    Every different text counts once in the fit; missing texts lie at the mean.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    sample = encoded.levels[_fitted(len(encoded.levels), seed)]
    options: Any = {"max_features": WORDS, "sublinear_tf": True, "token_pattern": r"(?u)\b\w+\b"}
    vectors: Any = TfidfVectorizer(**options)
    try:
        weights = vectors.fit_transform(sample)
    except ValueError:  # no words, such as punctuation only
        return
    size = min(DIMENSIONS, min(weights.shape) - 1)
    if size < 1:
        return
    directions: Any = TruncatedSVD(size, random_state=seed).fit(weights)
    table = directions.transform(vectors.transform(encoded.levels))
    yield from _embedded(name, encoded, table)


def _log_unit(present: np.ndarray) -> float | None:
    """The unit of the logarithm, or None for numbers that need none."""
    if present.min() < 0 or not (present > 0).any():
        return None
    unit = float(np.percentile(present[present > 0], 25))
    plain = _skewness(present)
    if plain <= SKEWED or abs(_skewness(np.log1p(present / unit))) >= plain / 2:
        return None
    return unit


def _skewness(values: np.ndarray) -> float:
    """In [−1, 1], from the outer eighths and the median."""
    low, middle, high = np.percentile(values, [12.5, 50, 87.5])
    return float((high + low - 2 * middle) / (high - low)) if high > low else 0.0


def _circle(values: np.ndarray, period: int, present: np.ndarray) -> Callable[[np.ndarray], None]:
    def write(out: np.ndarray) -> None:
        out[:] = 0
        angle = 2 * np.pi * values / period
        out[present, 0] = np.sin(angle) * np.sqrt(0.5)
        out[present, 1] = np.cos(angle) * np.sqrt(0.5)

    return write


def _embedded(name: str, encoded: Encoded, table: np.ndarray) -> Iterator[Part]:
    """A row of `table` per level, centred and scaled to a total variance of 1 over the rows."""
    table = np.asarray(table, dtype=np.float64)
    weights = encoded.counts / max(1, encoded.present)
    table = table - weights @ table
    variance = float(weights @ np.square(table).sum(1))
    if variance <= 0:
        return
    table = np.vstack([table / np.sqrt(variance), np.zeros(table.shape[1])]).astype(np.float32)

    def write(out: np.ndarray) -> None:
        out[:] = table[encoded.codes]  # −1, a missing value, is the row of zeros at the end

    yield Part([f"{name} [{at}]" for at in range(table.shape[1])], write)


def _fitted(n: int, seed: int) -> np.ndarray:
    if n <= FITTED_TEXTS:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, FITTED_TEXTS, replace=False))
