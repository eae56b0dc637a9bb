"""Rows judged by their nearest neighbours: KNN-Shapley values, neighbours, and both in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.checks import Task, check_columns, check_order, count, features
from upweight.valuation.judgement import KnnJudgement, Labels, make_labels
from upweight.valuation.parallel import workers
from upweight.valuation.selection import Batch, Plan, make_plan, map_batches
from upweight.valuation.utility import row_names
from upweight.valuation.values import Values

__all__ = ["knn_judge", "knn_shapley", "neighbours"]


def knn_judge(
    x: ArrayLike,
    y: ArrayLike | None = None,
    x_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    k: int = 5,
    keep: int | None = None,
    task: Task | None = None,
    truncate: int | None = None,
    block: int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    batch_size: int | None = None,
) -> KnnJudgement:
    """Nearest neighbours, and the KNN-Shapley values that follow from them, in one pass.

    See `knn_shapley` for the values, and `neighbours` for the distances.

    Parameters
    ----------
    x, y
        (n, d) features and (n,) labels or numbers of the training rows. Without y there are no
        values, only neighbours.
    x_test, y_test
        (m, d) and (m,) rows that judge the training rows. Default: these judge each other.
    k
        Neighbours that vote.
    keep
        Neighbours to keep for every row that was asked about; default k. With ``keep=truncate`` the
        values of other labels follow exactly, see `KnnJudgement.revalue`. They take
        8 m keep bytes.
    task, truncate, block, seed, n_jobs, batch_size
        As in `knn_shapley`.

    Returns
    -------
    KnnJudgement

    Raises
    ------
    ValueError
        As in `knn_shapley`; or if keep exceeds the players of a row.

    Examples
    --------
    >>> x = np.array([[0.0], [1.0], [3.0], [7.0]])
    >>> judged = knn_judge(x, ["a", "a", "b", "b"], k=1, keep=2)
    >>> judged.indices.tolist()
    [[1, 2], [0, 2], [1, 0], [2, 1]]
    >>> judged.distances[3]
    array([4., 6.], dtype=float32)
    >>> float(judged.values.sum())  # the nearest of 3 rows has the same label
    0.75
    """
    check_order(x, y)
    check_order(x_test, y_test, "x_test and y_test", "y_test.loc[x_test.index]")
    check_columns(x, x_test, "x_test", "x")
    table = features(x)
    queries = None if x_test is None else features(x_test, "x_test", columns=table.shape[1])
    if y is not None and (x_test is None) != (y_test is None):
        raise ValueError("expected x_test and y_test together, or neither")
    n = len(table)
    plan = make_plan(n, None if queries is None else len(queries), block, count(seed, "seed", 0))
    most, why = plan.players, _why(plan, n)
    k = count(k, "k", 1, most, why)
    keep = count(k if keep is None else keep, "keep", 1, most, why)
    known = None if truncate is None else count(truncate, "truncate", k)
    workers(n_jobs)
    size = None if batch_size is None else count(batch_size, "batch_size", 1)
    labels = None if y is None else make_labels(y, n, y_test, plan.queries, task)
    options: Any = {"n_jobs": n_jobs, "batch_size": size}
    return _judge(plan, table, queries, labels, k=k, keep=keep, known=known, options=options)


def _judge(
    plan: Plan,
    x: NDArray[Any],
    x_test: NDArray[Any] | None,
    labels: Labels | None,
    *,
    k: int,
    keep: int,
    known: int | None,
    options: Any,
) -> KnnJudgement:
    m, n = plan.queries, len(x)
    indices = np.empty((m, keep), np.int32 if n < 2**31 else np.int64)
    distances = np.empty((m, keep), np.float32)
    values = np.zeros(n)

    def work(batch: Batch) -> tuple[NDArray[np.intp], NDArray[np.float64] | None]:
        indices[batch.rows] = batch.members[batch.nearest[:, :keep]]
        distances[batch.rows] = batch.distances(keep)
        if labels is None:
            return batch.members, None
        nearest = batch.nearest[:, :known]
        given = labels.given[batch.members]
        worth, others = labels.worth(
            given, nearest, batch.rows, batch.own, k=k, players=batch.players
        )
        return batch.members, worth + others

    valued = 0 if labels is None else known
    wanted = None if valued is None else max(keep, valued)
    for members, worth in map_batches(work, plan, x, x_test, nearest=wanted, **options):
        if worth is not None:
            values[members] += worth
    found = None if labels is None else values / m
    task = None if labels is None else labels.task
    return KnnJudgement(found, indices, distances, plan.parts, n, k, task, plan.itself)


def _why(plan: Plan, rows: int) -> str:
    what = "a row is no neighbour of itself" if plan.itself else "the training rows"
    blocks = f", in blocks of {rows // len(plan.blocks):,} rows" if len(plan.blocks) > 1 else ""
    return f"{what}{blocks}"


def knn_shapley(
    x: ArrayLike,
    y: ArrayLike,
    x_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    k: int = 5,
    task: Task | None = None,
    truncate: int | None = None,
    block: int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    batch_size: int | None = None,
    names: Any = None,
) -> Values:
    """Shapley values of training rows in the game of K nearest neighbours: low where one misleads.

    The utility of a set S of training rows is a mean over m test rows, of ::

        classification   1/K  Σ_{j ≤ min(K, |S|)} [y_j = y_test]
        regression       −(1/K Σ_{j ≤ min(K, |S|)} (y_j − ȳ) − (y_test − ȳ))²

    over the nearest rows j in S of the test row; ȳ is the mean of y, which is what no neighbours
    predict. The value of a row is its Shapley value; the sum of them is the utility of all rows
    minus that of none: in classification, the mean share of the K nearest that have the test row's
    label. Exact, in O(m n (d + log n)).

    Parameters
    ----------
    x
        (n, d) features, on a common scale.
    y
        (n,) labels of any type that can be sorted, or numbers.
    x_test, y_test
        (m, d) and (m,) test rows. Default: the training rows judge each other, m = n: each is a
        test row for the others, and neither player nor neighbour of itself. This finds wrong
        labels better than a small clean test set does, with K of 3 to 5.
    k
        K.
    task
        ``"classification"`` or ``"regression"``. Default: regression if y are numbers that are not
        all whole.
    truncate
        Only the labels of so many nearest rows of a test row are looked at, at least K. Farther
        ones are taken to be like the average row, and share what is left equally, so that the sum
        of the values stays exact. What a test row contributes to a value then changes by less than
        1/truncate in classification, and than 40 B²/truncate in regression, where all y and y_test
        are within B of ȳ. It saves sorting: O(m n d).
    block
        Where rows judge each other and are more than this (default 50,000), they are cut at random
        into ⌈n / block⌉ nearly equal parts, and a row is judged within its own part, at a cost of
        n · block and not n². Values are then relative to the part. With test rows, and in fewer
        rows than that, all are in one part.
    seed
        Of the parts, and of the order in which equally near rows come.
    n_jobs
        Threads, -1 for all cores. It does not change the result.
    batch_size
        Test rows at once; default: such that a batch of distances takes 64 MB at most (or 16 rows
        if these take more). A thread needs about four times that. It changes the result by
        round-off only.
    names
        Of the training rows. Default: the index of x, if it is a frame, or 0, …, n − 1.

    Returns
    -------
    Values
        Exact, without standard errors. Divided by m as they are, they are of order 1/n.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, a label is missing, there is one class only,
        K is not between 1 and the number of players, the columns of x_test are not those of x, or
        the indexes of x and y have the same names in different orders.

    Notes
    -----
    Distances are computed without rounding, on a grid that is about 10⁻⁶ of the largest distance
    from the centre wide. So the same rows are the nearest for every batch size and number of
    threads. Of distances that differ by less than the grid can tell, either may be taken for the
    smaller one. Equally far rows come in the order of a ring on which the rows stand at random,
    beginning elsewhere for each test row. In the order of the table, only the first of many equal
    rows would count, and conflicts would not be seen where the table is sorted by label.

    References
    ----------
    Jia et al., Efficient task-specific data valuation for nearest neighbor algorithms, VLDB 2019:
    exact values for both tasks, and the error of truncated ones.

    Examples
    --------
    >>> x = np.append(np.arange(0.0, 6.0), np.arange(50.0, 56.0))[:, None]
    >>> y = np.repeat(["no", "yes"], 6)
    >>> y[3] = "yes"
    >>> values = knn_shapley(x, y, k=3)
    >>> values.top(1, harmful=True)
      row  value  rank
    0    3 ...
    """
    called = row_names(names, len(features(x)), like=x)
    options: Any = {"task": task, "truncate": truncate, "block": block, "seed": seed}
    work: Any = {"n_jobs": n_jobs, "batch_size": batch_size}
    judged = knn_judge(x, y, x_test, y_test, k=k, keep=1, **options, **work)
    assert judged.values is not None
    m, n = len(judged.indices), judged.rows
    told = {"method": "KNN-Shapley", "k": k, **options, "task": judged.task, "test_rows": m}
    told["judges"] = "the training rows themselves" if judged.itself else "test rows"
    return Values(
        judged.values,
        counts=np.full(n, m, np.int64),
        names=called,
        provenance=told,
        stopped="closed form",
    )


def neighbours(
    x: ArrayLike,
    k: int,
    x_query: ArrayLike | None = None,
    *,
    block: int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    batch_size: int | None = None,
) -> tuple[NDArray[np.integer[Any]], NDArray[np.float32]]:
    """The k nearest rows of each row, or of each query, by Euclidean distance.

    Parameters
    ----------
    x
        (n, d) features.
    k
        How many.
    x_query
        (m, d) rows to find neighbours for. Default: the rows of x, each without itself.
    block
        More rows than this (default 50,000) are cut at random into nearly equal parts, and the
        neighbours of a row are those in its own part: typical ones, but with b parts only every
        b-th pair of near duplicates is seen. With `x_query` all rows are looked at.
    seed
        Of the parts, and of the order in which equally near rows come.
    n_jobs, batch_size
        As in `knn_shapley`.

    Returns
    -------
    indices : ndarray
        (m, k) positions, nearest first; int32 where that suffices.
    distances : ndarray
        (m, k) float32.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or there are fewer than k rows to choose from.

    Examples
    --------
    >>> indices, distances = neighbours([[0.0], [1.0], [3.0]], 1)
    >>> indices.ravel().tolist(), distances.ravel().tolist()
    ([1, 0, 1], [1.0, 1.0, 2.0])
    """
    options: Any = {"block": block, "seed": seed, "n_jobs": n_jobs, "batch_size": batch_size}
    table = features(x)
    check_columns(x, x_query, "x_query", "x")
    if x_query is not None:
        x_query = features(x_query, "x_query", columns=table.shape[1])
    found = knn_judge(table, None, x_query, k=k, **options)
    return found.indices, found.distances
