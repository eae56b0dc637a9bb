"""Whether scores find the rows that are known to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.evaluate.checks import check_confidence, finite_array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Detection", "detection"]


@dataclass(frozen=True)
class Detection:
    """What `detection` found.

    Attributes
    ----------
    auc
        Area under the ROC curve: the chance that a wrong row is more suspicious than a right one.
        0.5 is chance.
    interval
        Of the AUC.
    confidence
        Of the interval.
    average_precision
        Σ over thresholds of precision × gain in recall. Chance is the share of wrong rows.
    at_k
        Of the k most suspicious rows: ``k``, ``precision`` (the share that is wrong), ``recall``
        (the share of the wrong rows that is among them).
    curve
        As rows are inspected from the most suspicious on: ``inspected`` rows,
        ``share_inspected``, ``share_found`` of the wrong rows.
    rows, wrong
        How many there are.
    """

    auc: float
    interval: tuple[float, float]
    confidence: float
    average_precision: float
    at_k: pd.DataFrame
    curve: pd.DataFrame
    rows: int
    wrong: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"AUC {self.auc:.3f} ({100 * self.confidence:g} % interval {low:.3f} to {high:.3f}), "
            f"average precision {self.average_precision:.3f}: {self.wrong:,} wrong among "
            f"{self.rows:,} rows"
        )


def detection(
    scores: ArrayLike,
    wrong: ArrayLike,
    *,
    ks: Sequence[int] | None = None,
    low_is_suspicious: bool = True,
    confidence: float = 0.95,
) -> Detection:
    """How well scores find the rows that are wrong, when the suspicious ones are inspected first.

    Parameters
    ----------
    scores
        (n,) one for each training row, such as its mean influence on the test rows.
    wrong
        (n,) booleans: the rows that are known to be wrong.
    ks
        For precision and recall. Default: 1, 5, 10 and 20 % of the rows, and as many as are wrong.
    low_is_suspicious
        True for influence and data values. False for what is high where a row is wrong: a loss,
        self-influence.
    confidence
        Of the interval of the AUC.

    Returns
    -------
    Detection

    Raises
    ------
    ValueError
        If shapes do not fit, a score is not finite, or no row or every row is wrong.

    Notes
    -----
    Rows with equal scores count as inspected in random order: precision, recall and the curve are
    the expected ones. The interval is DeLong's, on the scale of the logit. An AUC of 0 or 1 has no
    variance to see: its interval ends where all of min(wrong, right) independent pairs would be in
    order with probability (1 - confidence) / 2.

    Compare with the plain loss of each row, which finds wrong labels quite well.

    References
    ----------
    DeLong, DeLong & Clarke-Pearson, Comparing the areas under two or more correlated receiver
    operating characteristic curves, Biometrics 1988.

    Examples
    --------
    >>> found = detection([-2.0, 0.5, -0.1, 1.0], [True, False, True, False], ks=[1, 2])
    >>> found.auc, found.at_k["recall"].tolist()
    (1.0, [0.5, 1.0])
    """
    import pandas as pd

    check_confidence(confidence)
    given = finite_array(scores, "scores", ("n",))
    n = len(given)
    flags = _flags(wrong, n)
    count = int(flags.sum())
    suspicion = -given if low_is_suspicious else given

    inspected, found = _inspect(suspicion, flags)
    at = _ks(ks, n, count)
    hits = np.interp(at, inspected, found)
    precision = found[1:] / inspected[1:]
    auc, interval = _delong(suspicion[flags], suspicion[~flags], confidence)
    return Detection(
        auc,
        interval,
        confidence,
        float((np.diff(found) * precision).sum() / count),
        pd.DataFrame({"k": at, "precision": hits / at, "recall": hits / count}),
        pd.DataFrame(
            {
                "inspected": inspected,
                "share_inspected": inspected / n,
                "share_found": found / count,
            }
        ),
        n,
        count,
    )


def _flags(wrong: ArrayLike, n: int) -> NDArray[np.bool_]:
    flags = np.asarray(wrong)
    if flags.shape != (n,) or flags.dtype != np.bool_:
        raise ValueError(
            f"expected wrong as booleans of shape ({n},), like the scores; got {flags.dtype} of "
            f"shape {flags.shape}"
        )
    if flags.all() or not flags.any():
        raise ValueError(
            f"expected some rows to be wrong and some not; got {flags.sum()} of {n} that are"
        )
    return flags


def _ks(ks: Sequence[int] | None, n: int, wrong: int) -> NDArray[np.int64]:
    if ks is None:
        ks = sorted({wrong, *(int(np.ceil(share * n)) for share in (0.01, 0.05, 0.1, 0.2))})
    given = np.asarray(ks)
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
        raise ValueError(f"expected ks as a list of whole numbers; got {ks!r}")
    if given.min() < 1 or given.max() > n:
        raise ValueError(f"expected every k between 1 and the {n} rows; got {ks!r}")
    return given.astype(np.int64)


def _inspect(
    suspicion: NDArray[np.float64], wrong: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows inspected and wrong rows found after 0, 1, … groups of equally suspicious rows."""
    _, group = np.unique(-suspicion, return_inverse=True)
    rows, hits = np.bincount(group), np.bincount(group[wrong], minlength=group.max() + 1)
    return np.cumsum(np.append(0, rows)), np.cumsum(np.append(0, hits))


def _delong(
    wrong: NDArray[np.float64], right: NDArray[np.float64], confidence: float
) -> tuple[float, tuple[float, float]]:
    """The area under the ROC curve of suspicion, and its interval."""
    from scipy.special import expit, logit, ndtri
    from scipy.stats import rankdata

    a, b = len(wrong), len(right)
    ranks = rankdata(np.concatenate([wrong, right]))
    beaten = (ranks[:a] - rankdata(wrong)) / b  # by each wrong row: the share of right ones
    beating = 1 - (ranks[a:] - rankdata(right)) / a
    auc = float(beaten.mean())
    tail = (1 - confidence) / 2
    if auc in (0.0, 1.0):
        end = float(tail ** (1 / min(a, b)))
        return auc, (end, 1.0) if auc else (0.0, 1.0 - end)
    if min(a, b) == 1:
        return auc, (0.0, 1.0)  # one row has no variance
    error = np.sqrt(beaten.var(ddof=1) / a + beating.var(ddof=1) / b) / (auc * (1 - auc))
    low, high = expit(logit(auc) + ndtri([tail, 1 - tail]) * error)
    return auc, (float(low), float(high))
