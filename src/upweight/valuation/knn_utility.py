"""The score of the vote of the nearest rows in a set: nothing is fitted, and sets grow cheaply.

Letters: n training rows, s of them in a set, m test rows, K neighbours, L ≤ n rows in the order of
a test row, C classes, M sets, P orders.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.checks import (
    Task,
    check_pairs,
    codes_in,
    encode,
    features,
    targets,
    task_of,
)
from upweight.valuation.fingerprints import digest
from upweight.valuation.knn import knn_judge
from upweight.valuation.ridge_utility import not_finite
from upweight.valuation.scoring import get_scoring
from upweight.valuation.utility import Evaluated, Utility, row_names

__all__ = ["KnnUtility"]

REVISION = 1  # raised when the same data get other utilities, so that no cache gives old ones
Floats = NDArray[np.float64]
Places = NDArray[np.int32]

LARGEST = 2**30  # bytes of the order of all neighbours
AT_ONCE = 2**23  # bytes of the arrays of the orders that grow at once


class KnnUtility(Utility):
    """u(S): how well the K nearest rows in S predict other rows.

    By default it is the game whose Shapley values `knn_shapley` has in closed form: a mean over m
    test rows of ::

        classification   1/K  Σ_{j ≤ min(K, |S|)} [y_j = y_test]
        regression       −(1/K Σ_{j ≤ min(K, |S|)} (y_j − ȳ) − (y_test − ȳ))²

    over the nearest rows j in S of the test row, ȳ the mean of all training targets. So Banzhaf or
    Beta values of the same game can be had, and estimates can be compared with exact values.

    Parameters
    ----------
    train
        ``(x, y)``: (n, d) features on a common scale, and (n,) labels or numbers.
    test
        ``(x, y)`` of m test rows. Default: the training rows judge each other, each without itself.
    k
        K.
    scoring
        Default: as above. Or, in a classification, a score of the shares of the classes among the
        ``min(K, |S|)`` nearest: ``"accuracy"`` of the most frequent class, the first of equals, 1/C
        where there are no neighbours; ``"log_likelihood"`` or ``"brier"``, smoothed as by
        `laplace` with as many rows as there are neighbours.
    task
        ``"classification"`` or ``"regression"``. Default: regression if y are numbers that are not
        all whole.
    names
        Of the training rows; default the index of x, if it is a frame, or 0, …, n − 1.
    seed
        Of the order in which equally near rows come, as in `knn_shapley`.
    cache
        Default: one in memory.

    Raises
    ------
    ValueError
        If data or settings do not make sense, names of rows or columns do not fit, or the order of
        all neighbours would take more than 1 GB (4 m n bytes; where each row comes in it takes as
        much again).

    References
    ----------
    Jia et al., Efficient task-specific data valuation for nearest neighbor algorithms, VLDB 2019,
    eqs. 5 and 25.

    Examples
    --------
    >>> x, y = np.array([[0.0], [1.0], [3.0]]), ["no", "yes", "yes"]
    >>> utility = KnnUtility((x, y), ([[0.2], [2.8]], ["no", "yes"]), k=1)
    >>> utility([]), utility([1]), utility([0, 2])
    (0.0, 0.5, 1.0)
    >>> utility.chains(np.array([[2, 1, 0]]))
    array([[0. , 0.5, 0.5, 1. ]])
    """

    prefer: Literal["threads", "processes"] = "threads"

    def __init__(
        self,
        train: tuple[ArrayLike, ArrayLike],
        test: tuple[ArrayLike, ArrayLike] | None = None,
        k: int = 5,
        scoring: str | None = None,
        *,
        task: Task | None = None,
        names: Any = None,
        seed: int = 0,
        cache: UtilityCache | None = None,
    ) -> None:
        check_pairs(train, test)
        x = features(train[0], "the features of train")
        y = targets(train[1], len(x))
        self.n = n = len(x)
        self.names = row_names(names, n, like=train[0])
        self.cache = UtilityCache() if cache is None else cache
        self.task: Task = task_of(y, task)
        self._itself = test is None
        others = (
            None if test is None else features(test[0], "the features of test", columns=x.shape[1])
        )
        self.m = m = n if others is None else len(others)
        asked = y if test is None else targets(test[1], m, "y of test")
        if scoring is not None:
            if self.task == "regression":
                raise ValueError(f"expected no scoring for a regression; got {scoring!r}")
            get_scoring(scoring, self.task)
        self.scoring = scoring
        if 4 * m * n > LARGEST:
            raise ValueError(
                f"expected at most {LARGEST // 4:,} pairs of training and test rows, whose order "
                f"is kept; got {n:,} x {m:,}: take fewer test rows, or knn_shapley"
            )
        if self.task == "classification":
            encoded = encode(y)
            self._classes, self._given = len(encoded.classes), encoded.codes.astype(np.intp)
            self._asked: NDArray[Any] = codes_in(encoded.classes, asked)
        else:
            task_of(asked, "regression")
            numbers = y.astype(np.float64)
            self._classes, self._given = 0, numbers - numbers.mean()
            self._asked = asked.astype(np.float64) - numbers.mean()
        judged = knn_judge(x, None, others, k=k, keep=n - self._itself, block=max(n, 2), seed=seed)
        self.k = judged.k
        self._order: Places = np.asarray(judged.indices, np.int32)  # (m, L)

    @property
    def fingerprint(self) -> str | None:
        """A digest of neighbours, labels and settings."""
        return self._digest

    @cached_property
    def _digest(self) -> str | None:
        settings = self.k, self.scoring, self.task, self._classes
        return digest("KnnUtility", REVISION, *settings, self._order, self._given, self._asked)

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """Set by set: the first K of the set in the order of each test row."""
        tests, terms = np.arange(self.m), np.empty((len(masks), self.m))
        for i, mask in enumerate(masks):
            terms[i] = self._terms(self._nearest(mask), tests)
        return not_finite(self._mean(terms))

    def chains(self, orders: NDArray[np.intp]) -> Floats:
        """(P, n + 1) utilities of the first 0, 1, …, n rows of each of (P, n) orders.

        A row that joins is looked at where it is among the K nearest so far: about K ln(n / K) rows
        of an order for each test row.
        """
        values = np.empty((len(orders), self.n + 1))
        step = max(1, AT_ONCE // (8 * self.m * (self.k + 2)))
        for i in range(0, len(orders), step):
            values[i : i + step] = self._grow(orders[i : i + step])
        return values

    def _grow(self, orders: NDArray[np.intp]) -> Floats:
        p, m, k = len(orders), self.m, self.k
        none = self._order.shape[1]
        best = np.full((p, m, k), none, np.int32)  # places of the nearest in the order, ascending
        empty = self._terms(np.full((m, k), -1, np.int32), np.arange(m))
        terms = np.tile(empty, (p, 1))
        values = np.empty((p, self.n + 1))
        values[:, 0] = self._mean(terms)
        for size, joining in enumerate(orders.T, 1):
            place = self._places[joining]  # (P, m)
            chain, test = np.nonzero(place < best[:, :, -1])
            near = best[chain, test]
            near[:, -1] = place[chain, test]
            near.sort(axis=1)
            best[chain, test] = near
            terms[chain, test] = self._terms(self._rows(near, test), test)
            values[:, size] = self._mean(terms)
        return values

    @cached_property
    def _places(self) -> Places:
        """(n, m) where a training row is in the order of a test row; L for the row itself."""
        m, players = self._order.shape
        places = np.full((self.n, m), players, np.int32)
        places[self._order, np.arange(m)[:, None]] = np.arange(players, dtype=np.int32)
        return places

    def _rows(self, places: Places, test: NDArray[np.intp]) -> Places:
        """(q, K) rows at places in the orders of q test rows; −1 for the place L."""
        none = self._order.shape[1]
        rows = self._order[test[:, None], np.minimum(places, none - 1)]
        return np.where(places < none, rows, np.int32(-1))

    def _nearest(self, mask: NDArray[np.bool_]) -> Places:
        """(m, K) the nearest rows of a set for each test row, then −1."""
        order, k = self._order, self.k
        most, size = order.shape[1], np.count_nonzero(mask)
        if size * size <= 2 * k * self.n:  # so few that all of them are looked at
            places = np.full((self.m, size + k), most, np.int32)
            places[:, :size] = self._places[mask].T
            places.sort(axis=1)
            return self._rows(places[:, :k], np.arange(self.m))
        near, waiting = np.full((self.m, k), -1, np.int32), np.arange(self.m)
        width = min(most, 2 * k * self.n // size + 16)
        while len(waiting):  # most have K of the set among the first 2 K n / s
            there = mask[order[waiting, :width]]
            rank = there.cumsum(axis=1, dtype=np.int32)
            done = (rank[:, -1] >= k) | (width == most)
            test, place = np.nonzero(there & (rank <= k) & done[:, None])
            near[waiting[test], rank[test, place] - 1] = order[waiting[test], place]
            waiting, width = waiting[~done], min(most, 4 * width)
        return near

    def _terms(self, near: Places, test: NDArray[np.intp]) -> Floats:
        """(q, K) nearest rows, −1 for none, of q test rows: what each adds to the score, (q,)."""
        there, asked = near >= 0, self._asked[test]
        if self.task == "regression":
            total = np.where(there, self._given[near], 0.0).sum(axis=1)
            return -((total / self.k - asked) ** 2)
        codes = np.where(there, self._given[near], -1)
        own = (codes == asked[:, None]).sum(axis=1)
        if self.scoring is None:
            return own / 1.0
        classes, voters = self._classes, there.sum(axis=1)
        votes = (codes[:, :, None] == np.arange(classes)).sum(axis=1)  # (q, C)
        if self.scoring == "accuracy":
            return np.where(voters > 0, votes.argmax(axis=1) == asked, 1 / classes)
        total = voters + classes
        if self.scoring == "log_likelihood":
            return np.log((own + 1) / total)
        squares = ((votes + 1) ** 2).sum(axis=1)
        return -(squares / total**2 - 2 * (own + 1) / total + 1)

    def _mean(self, terms: Floats) -> Floats:
        """(P, m) → (P,)."""
        shares = self.task == "classification" and self.scoring is None
        return terms.sum(axis=1) / (self.m * (self.k if shares else 1))
