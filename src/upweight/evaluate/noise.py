"""How much of retrained outputs is noise of training, and what that leaves to predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from upweight.evaluate.ranks import constant_columns, enough, split_half_reliability, tell_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NoiseCeiling", "noise_ceiling"]


@dataclass(frozen=True)
class NoiseCeiling:
    """How much of the outputs is not noise of training: what `noise_ceiling` found.

    Attributes
    ----------
    ceiling
        √reliability, mean over test rows: the correlation of the mean over R seeds with the
        noiseless truth. No scores can be expected to correlate better with that mean.
    reliability
        The correlation that means over R fresh seeds would have with these means over R seeds.
    per_test
        By test row: ``test``, ``reliability``, ``ceiling``; NaN where outputs are constant.
    seeds
        R.
    """

    ceiling: float
    reliability: float
    per_test: pd.DataFrame
    seeds: int

    def __str__(self) -> str:
        return (
            f"noise ceiling {self.ceiling:.3f} (reliability {self.reliability:.3f} of means over "
            f"{self.seeds} seeds)"
        )


def noise_ceiling(outputs: ArrayLike, *, splits: int = 100, seed: int = 0) -> NoiseCeiling:
    """How well any scores could predict outputs that vary by the seed of training.

    For each test row, half of the seeds is averaged and correlated over the subsets (Spearman) with
    the average of another half. With r the mean of that over random splits into halves of h seeds,
    the reliability of the mean over all R seeds is (Spearman-Brown)

        reliability = k r / (1 + (k - 1) r),    k = R / h,    ceiling = √reliability

    Parameters
    ----------
    outputs
        (S, R, m) for each subset, seed and test row: `Retrained.outputs`, of either protocol.
        Subsets with a failed run (NaN) are left out.
    splits
        Random splits to average over.
    seed
        Of the splits.

    Returns
    -------
    NoiseCeiling

    Raises
    ------
    ValueError
        If there are fewer than two seeds, or fewer than three subsets without a failure, or all
        outputs are constant.

    Notes
    -----
    A negative reliability, which chance can give, counts as 0. Spearman-Brown is exact for values
    and close for ranks.

    References
    ----------
    Spearman, Correlation calculated from faulty data, 1910; Brown, 1910, same journal.

    Examples
    --------
    >>> truth, noise = np.arange(6.0)[:, None, None], np.array([0.1, -0.2, 0.1, 0.2])
    >>> noise_ceiling(truth + noise[:, None]).ceiling
    1.0
    """
    import pandas as pd

    given = np.asarray(outputs, dtype=np.float64)
    if given.ndim != 3 or 0 in given.shape:
        raise ValueError(f"expected outputs of shape (S, R, m); got {given.shape}")
    if given.shape[1] < 2:
        raise ValueError(
            "expected at least two seeds for each subset, to see what the seed does; got "
            f"{given.shape[1]}: retrain with seeds=2 or more"
        )
    if splits < 1:
        raise ValueError(f"expected at least one split; got {splits}")
    given = given[~np.isnan(given).any(axis=(1, 2))]
    enough(len(given))
    constant = constant_columns(given.mean(axis=1))  # (m,)
    tell_of(constant)
    varying = given[:, :, ~constant]
    reliability = np.full(len(constant), np.nan)
    reliability[~constant] = split_half_reliability(varying, splits, np.random.default_rng(seed))
    ceiling = np.sqrt(reliability)
    frame = {"test": np.arange(len(constant)), "reliability": reliability, "ceiling": ceiling}
    return NoiseCeiling(
        float(np.nanmean(ceiling)),
        float(np.nanmean(reliability)),
        pd.DataFrame(frame),
        given.shape[1],
    )
