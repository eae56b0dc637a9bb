"""Training without the rows that scores point at, beside training without random ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.evaluate.checks import finite_array
from upweight.evaluate.retrain import (
    Refit,
    Retrained,
    RetrainOptions,
    retrain,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Kind", "brittleness", "removal_curve"]

Kind: TypeAlias = Literal["remove-lowest", "remove-highest", "add-lowest", "add-highest"]


def removal_curve(
    scores: ArrayLike,
    refit: Refit,
    *,
    kind: Kind = "remove-lowest",
    fractions: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4),
    random_repeats: int = 3,
    seed: int = 0,
    **options: Unpack[RetrainOptions],
) -> pd.DataFrame:
    """Outputs as training rows go, or come, in the order of their scores and in random orders.

    Parameters
    ----------
    scores
        (n,) one for each training row, such as its mean influence. Equal ones go by position.
    refit
        As for `retrain`.
    kind
        Which rows are removed first, or are the first to be trained on. Removing the lowest should
        help or at least do no harm; removing the highest should hurt; the highest alone should do
        well.
    fractions
        Of the rows: those removed, or those trained on. Each gives ``round(fraction * n)`` rows.
    random_repeats
        Random orders to compare with.
    seed
        Of the random orders.
    **options
        For `retrain`. The protocol is "fixed-seed" unless another is given. Subsets that occur
        twice, such as that of all rows, are trained once.

    Returns
    -------
    DataFrame
        A line for each training: ``kind``, ``fraction``, ``order`` ("score" or "random"),
        ``repeat`` (of the random orders), ``rows`` trained on, ``seed``, ``output`` (mean over test
        rows). Failed trainings are left out.

    Raises
    ------
    ValueError
        If a score is not finite, the kind is unknown, or a fraction leaves no row to train on.

    References
    ----------
    Ghorbani & Zou, Data Shapley, ICML 2019, §4.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 6.0, 7.0])
    >>> curve = removal_curve(x, lambda rows, seed: [x[rows].mean()], fractions=[0, 0.5])
    >>> curve.query("order == 'score'")[["fraction", "rows", "output"]]
       fraction  rows  output
    0       0.0     4     4.0
    1       0.5     2     6.5
    """
    import pandas as pd

    given = finite_array(scores, "scores", ("n",))
    if kind not in get_args(Kind):
        raise ValueError(f"expected a kind among {get_args(Kind)}; got {kind!r}")
    if random_repeats < 0:
        raise ValueError(f"expected random_repeats ≥ 0; got {random_repeats}")
    removes, lowest = kind.startswith("remove"), kind.endswith("lowest")
    counts = [_count(fraction, len(given), removes) for fraction in fractions]
    if not counts:
        raise ValueError("expected at least one fraction; got none")
    rng = np.random.default_rng(seed)
    first = np.argsort(given if lowest else -given, kind="stable")
    orders = [first, *(rng.permutation(len(given)) for _ in range(random_repeats))]
    masks = np.array(
        [_leading(order, count) != removes for order in orders for count in counts]
    )  # (orders · fractions, n)
    done, place = _retrain_distinct(refit, masks, options)
    output = done.outputs.mean(axis=2)  # (S, R)
    lines = [
        {
            "kind": kind,
            "fraction": fraction,
            "order": "random" if number else "score",
            "repeat": max(number - 1, 0),
            "rows": int(done.masks[subset].sum()),
            "seed": int(done.seeds[subset, r]),
            "output": float(output[subset, r]),
        }
        for (number, fraction), subset in zip(
            ((number, fraction) for number in range(len(orders)) for fraction in fractions),
            place,
            strict=True,
        )
        for r in range(output.shape[1])
    ]
    return pd.DataFrame(lines).dropna(subset="output", ignore_index=True)


def brittleness(
    scores: ArrayLike,
    refit: Refit,
    *,
    ks: Sequence[int],
    tests: ArrayLike | None = None,
    threshold: float = 0.0,
    random_repeats: int = 1,
    seed: int = 0,
    **options: Unpack[RetrainOptions],
) -> pd.DataFrame:
    """How few of its most helpful training rows a prediction hangs on.

    For each test row whose output is above the threshold to begin with, its k highest scored
    training rows are removed and the model is trained again: does the output fall to the threshold
    or below? Beside it, with k random rows removed.

    Parameters
    ----------
    scores
        (m, n) test rows × training rows; positive where the training row helps.
    refit
        As for `retrain`, with outputs such as margins: above the threshold where the prediction is
        right.
    ks
        Numbers of rows to remove.
    tests
        Positions of the test rows to try; None for all. Each takes a training for each k and seed.
    threshold
        Between right and wrong.
    random_repeats
        Random removals for each k, each judged on all of those test rows.
    seed
        Of the random removals.
    **options
        For `retrain`. The protocol is "fixed-seed" unless another is given; with several seeds the
        mean output is judged. A store keeps the first training in ``base``, the others in
        ``removed``.

    Returns
    -------
    DataFrame
        A line for each k, order ("score" or "random"), repeat and test row that was right:
        ``k``, ``order``, ``repeat``, ``test``, ``before``, ``after``, ``flipped``. Failed trainings
        are left out. ``frame.groupby(["order", "k"])["flipped"].mean()`` is what papers show.

    Raises
    ------
    ValueError
        If a k leaves no row to train on, shapes do not fit, or no test row is right beforehand.

    References
    ----------
    Ilyas et al., Datamodels, ICML 2022, §4.1; Park et al., TRAK, ICML 2023, §5.

    Examples
    --------
    The output is the mean of the rows less 2, so the largest hold it up.

    >>> x = np.array([1.0, 1.0, 5.0, 7.0])
    >>> found = brittleness([x], lambda rows, seed: [x[rows].mean() - 2], ks=[1, 2], seed=4)
    >>> found.query("order == 'score'")[["k", "before", "after", "flipped"]]
       k  before     after  flipped
    0  1     1.5  0.333333    False
    1  2     1.5 -1.000000     True
    """
    import pandas as pd

    given = finite_array(scores, "scores of test rows × training rows", ("m", "n"))
    m, n = given.shape
    counts = [_removable(k, n) for k in ks]
    if not counts or random_repeats < 0:
        raise ValueError(
            f"expected at least one k and random_repeats ≥ 0; got {ks!r} and {random_repeats}"
        )
    before = _mean(refit, np.ones((1, n), dtype=np.bool_), _inside(options, "base"), m)[0]
    right = _tests(tests, m)
    right = right[before[right] > threshold]
    if not right.size:
        raise ValueError(f"expected test rows with an output above {threshold:g}; none has one")
    rng = np.random.default_rng(seed)
    helpful = np.argsort(-given[right], axis=1, kind="stable")
    masks = [~_leading(order, k) for k in counts for order in helpful]
    plan = [("score", k, 0, [test]) for k in counts for test in right]
    for k in counts:
        for repeat in range(random_repeats):
            masks.append(~_leading(rng.permutation(n), k))
            plan.append(("random", k, repeat, list(right)))
    after = _mean(refit, np.array(masks), _inside(options, "removed"), m)
    lines = [
        {
            "k": k,
            "order": order,
            "repeat": repeat,
            "test": int(test),
            "before": float(before[test]),
            "after": float(outputs[test]),
            "flipped": bool(outputs[test] <= threshold),
        }
        for (order, k, repeat, judged), outputs in zip(plan, after, strict=True)
        for test in judged
    ]
    return pd.DataFrame(lines).dropna(subset="after", ignore_index=True)


def _leading(order: NDArray[np.intp], count: int) -> NDArray[np.bool_]:
    """(n,) True for the first rows of an order."""
    mask = np.zeros(len(order), dtype=np.bool_)
    mask[order[:count]] = True
    return mask


def _count(fraction: float, n: int, removes: bool) -> int:
    count = round(fraction * n)
    if not 0 <= fraction <= 1 or count == (n if removes else 0):
        raise ValueError(
            f"expected fractions between 0 and 1 that leave rows to train on; got {fraction} of "
            f"{n} rows"
        )
    return count


def _removable(k: int, n: int) -> int:
    if not 1 <= k < n:
        raise ValueError(f"expected every k between 1 and {n - 1}, of {n} training rows; got {k}")
    return int(k)


def _tests(tests: ArrayLike | None, m: int) -> NDArray[np.intp]:
    rows = np.arange(m) if tests is None else np.asarray(tests)
    valid = rows.ndim == 1 and rows.size > 0 and rows.dtype.kind in "iu"
    if not valid or rows.min() < 0 or rows.max() >= m or len(np.unique(rows)) != rows.size:
        raise ValueError(f"expected different positions of test rows below {m}; got {tests!r}")
    return rows.astype(np.intp)


def _inside(options: RetrainOptions, name: str) -> RetrainOptions:
    """The options with a folder of that name in the store, if there is one."""
    store: str | os.PathLike[str] | None = options.get("store")
    return options if store is None else {**options, "store": Path(store) / name}


def _retrain_distinct(
    refit: Refit, masks: NDArray[np.bool_], options: RetrainOptions
) -> tuple[Retrained, NDArray[np.intp]]:
    """Each different subset trained once, and which of them each mask is."""
    settings: RetrainOptions = {"protocol": "fixed-seed", **options}
    distinct, place = np.unique(masks, axis=0, return_inverse=True)
    return retrain(refit, distinct, **settings), place.ravel()


def _mean(
    refit: Refit, masks: NDArray[np.bool_], options: RetrainOptions, m: int
) -> NDArray[np.float64]:
    """(S, m) mean outputs over the seeds."""
    done, place = _retrain_distinct(refit, masks, options)
    if done.outputs.shape[2] != m:
        raise ValueError(
            f"expected refit to give an output for each of the {m} test rows of the scores; got "
            f"{done.outputs.shape[2]}"
        )
    return done.mean[place]
