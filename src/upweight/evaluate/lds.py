"""The linear datamodeling score: whether sums of scores rank subsets as retraining does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.evaluate.checks import check_confidence, finite_array
from upweight.evaluate.ranks import bootstrap_spearman, constant_columns, enough, spearman, tell_of
from upweight.evaluate.subsets import check_masks

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LinearDatamodelingScore",
    "additive_ceiling",
    "lds",
    "linear_datamodeling_score",
    "prediction_score",
]


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """What `linear_datamodeling_score` found.

    Attributes
    ----------
    value
        Mean over test rows of the rank correlation: 1 where the scores order the subsets as
        retraining does, 0 where they know nothing of it.
    interval
        Of the value, by a bootstrap over test rows and subsets; NaN without one.
    confidence
        Of the interval.
    per_test
        By test row: ``test``, ``correlation``; NaN for those that are constant.
    constant
        Positions of the test rows that are left out, because their outputs or predictions are the
        same for all subsets.
    subsets
        How many were used.
    """

    value: float
    interval: tuple[float, float]
    confidence: float
    per_test: pd.DataFrame
    constant: NDArray[np.intp]
    subsets: int

    def __str__(self) -> str:
        low, high = self.interval
        within = f" ({100 * self.confidence:g} % interval {low:.3f} to {high:.3f})"
        rows = len(self.per_test) - len(self.constant)
        return (
            f"LDS {self.value:.3f}{'' if np.isnan(low) else within}: "
            f"{rows:,} test rows, {self.subsets:,} subsets"
        )


def linear_datamodeling_score(
    scores: ArrayLike,
    masks: ArrayLike,
    outputs: ArrayLike,
    *,
    higher_is_better: bool = True,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """How well sums of scores predict the order in which subsets of training rows do.

        LDS = mean over j of Spearman over S of ( Σ_{i in S} scores[j, i], outputs[S, j] )

    Parameters
    ----------
    scores
        (m, n) test rows × training rows; positive where the training row helps.
    masks
        (S, n) which rows each subset has; random halves by custom (`random_subsets`).
    outputs
        (S, m) of models trained on the subsets, such as `Retrained.mean`. A subset whose outputs
        are all NaN, because its runs failed, is left out.
    higher_is_better
        Of the outputs: True for margins, False for losses.
    bootstrap
        Resamples for the interval; 0 for none.
    confidence, seed
        Of the interval; of the resampling.

    Returns
    -------
    LinearDatamodelingScore

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, fewer than 3 subsets are left, or no test row
        has outputs and predictions that vary.

    Warns
    -----
    UserWarning
        If some test rows are left out, because their outputs or predictions do not vary.

    Notes
    -----
    Each resample draws m test rows *and* S subsets with replacement, and ranks anew what it drew;
    a subset that was drawn twice is a tie, and ties get their mean rank. Such ties lower high rank
    correlations a little, so the percentiles are shifted by as much as the mean of the resamples is
    off the value. The interval is for other test rows and as many other subsets; the seeds of
    training are not resampled, for which see `noise_ceiling`.

    References
    ----------
    Park et al., TRAK: attributing model behavior at scale, ICML 2023, §4; Ilyas et al.,
    Datamodels: predicting predictions from training data, ICML 2022. Two-way resampling: Owen, The
    pigeonhole bootstrap, Annals of Applied Statistics 2007.

    Examples
    --------
    >>> masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0]])
    >>> scores = np.array([[1.0, 2.0, 4.0]])
    >>> outputs = (masks @ scores.T) ** 3
    >>> linear_datamodeling_score(scores, masks, outputs, bootstrap=0).value
    1.0
    """
    checked = check_masks(masks)
    given = finite_array(scores, "scores of test rows × training rows", ("m", checked.shape[1]))
    return prediction_score(
        checked.astype(np.float64) @ given.T,  # (S, n) @ (n, m) -> (S, m)
        outputs,
        higher_is_better=higher_is_better,
        bootstrap=bootstrap,
        confidence=confidence,
        seed=seed,
    )


lds = linear_datamodeling_score


def prediction_score(
    predictions: ArrayLike,
    outputs: ArrayLike,
    *,
    higher_is_better: bool = True,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """The linear datamodeling score of predictions that need not be sums of scores.

    Parameters
    ----------
    predictions
        (S, m) predicted for each subset and test row, on any scale; higher = better.
    outputs, higher_is_better, bootstrap, confidence, seed
        As for `linear_datamodeling_score`, which says the rest.

    Returns
    -------
    LinearDatamodelingScore

    Examples
    --------
    >>> loss = [[0.1, 0.5], [0.2, 0.4], [0.4, 0.3]]
    >>> found = prediction_score([[3, 1], [2, 2], [1, 3]], loss, higher_is_better=False)
    >>> found.per_test["correlation"].tolist()
    [1.0, 1.0]
    """
    import pandas as pd

    check_confidence(confidence)
    if bootstrap < 0:
        raise ValueError(f"expected a number of bootstrap resamples ≥ 0; got {bootstrap}")
    x, y = _paired(predictions, outputs)  # (S, m)
    y = y if higher_is_better else -y
    constant = constant_columns(x) | constant_columns(y)  # (m,)
    tell_of(constant)
    x, y = x[:, ~constant], y[:, ~constant]
    correlation = np.full(len(constant), np.nan)
    correlation[~constant] = spearman(x, y)
    value = float(correlation[~constant].mean())
    low, high = np.nan, np.nan
    if bootstrap:
        means = bootstrap_spearman(x, y, bootstrap, np.random.default_rng(seed))
        means += value - np.nanmean(means)
        ends = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = np.clip(ends, -1.0, 1.0)
    return LinearDatamodelingScore(
        value,
        (float(low), float(high)),
        confidence,
        pd.DataFrame({"test": np.arange(len(constant)), "correlation": correlation}),
        np.flatnonzero(constant),
        len(x),
    )


def additive_ceiling(
    leave_one_out_outputs: ArrayLike,
    base: ArrayLike | None,
    masks: ArrayLike,
    outputs: ArrayLike,
    *,
    higher_is_better: bool = True,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """The LDS of what leaving out each row really does: how far adding up can take one.

        score[j, i] = output_j(all rows) - output_j(all but row i)

    Scores that approximate these effects will hardly do better, whatever the method.

    Parameters
    ----------
    leave_one_out_outputs
        (n, m) outputs of models that lack one row each.
    base
        (m,) outputs of the model of all rows. It may be None where the subsets are of equal size:
        it adds the same to all of them then.
    masks, outputs, higher_is_better, bootstrap, confidence, seed
        As for `linear_datamodeling_score`; ``higher_is_better`` is of all three kinds of outputs.

    Returns
    -------
    LinearDatamodelingScore

    Raises
    ------
    ValueError
        As `linear_datamodeling_score`, and if subsets of several sizes come without ``base``.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 6.0])
    >>> masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    >>> without = (x.sum() - x[:, None]) / 2
    >>> means = masks @ x[:, None] / 2
    >>> additive_ceiling(without, [3.0], masks, means).value
    1.0
    """
    checked = check_masks(masks)
    without = finite_array(
        leave_one_out_outputs, "outputs without each training row", (checked.shape[1], "m")
    )
    sizes = np.unique(checked.sum(axis=1))
    if base is None and len(sizes) > 1:
        raise ValueError(
            "expected the outputs of the model of all rows as base, because the subsets have "
            f"{sizes[0]} to {sizes[-1]} rows; got None"
        )
    start = without.mean(axis=0) if base is None else base
    effects = finite_array(start, "base outputs", (without.shape[1],)) - without  # (n, m)
    return linear_datamodeling_score(
        effects.T if higher_is_better else -effects.T,
        checked,
        outputs,
        higher_is_better=higher_is_better,
        bootstrap=bootstrap,
        confidence=confidence,
        seed=seed,
    )


def _paired(
    predictions: ArrayLike, outputs: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both of shape (S, m), without the subsets that have no outputs."""
    x = finite_array(predictions, "predictions of subsets × test rows", ("S", "m"))
    y = np.asarray(outputs, dtype=np.float64)
    if y.shape != x.shape:
        raise ValueError(f"expected outputs of shape {x.shape}, subsets × test rows; got {y.shape}")
    there = ~np.isnan(y).all(axis=1)
    enough(int(there.sum()))
    return x[there], finite_array(y[there], "outputs of subsets × test rows", ("S", "m"))
