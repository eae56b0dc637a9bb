"""What nearest neighbours say of rows, and what they would say of other labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.checks import Task, count, encode, targets, task_of
from upweight.valuation.games import classification_game, regression_game
from upweight.valuation.parallel import in_order

__all__ = ["KnnJudgement", "Labels", "knn_proba", "make_labels"]

REVALUED = 2**21  # stored neighbours that are valued at once


@dataclass(frozen=True, eq=False)
class KnnJudgement:
    """What the nearest neighbours say of rows, from `knn_judge`.

    Attributes
    ----------
    values
        (n,) KNN-Shapley values of the training rows; None where no labels were given.
    indices
        (m, keep) positions of the nearest training rows of every row that was asked about, nearest
        first, int32 where that suffices.
    distances
        (m, keep) Euclidean distances to them, float32.
    parts
        (m,) the number of the part of the table, from 0, in which its neighbours were looked for.
    rows
        n.
    k, task, itself
        As it was judged; `itself`: the training rows judged each other.
    """

    values: NDArray[np.float64] | None
    indices: NDArray[np.integer[Any]]
    distances: NDArray[np.float32]
    parts: NDArray[np.int32]
    rows: int
    k: int
    task: Task | None
    itself: bool

    def revalue(
        self,
        y: ArrayLike,
        y_test: ArrayLike | None = None,
        *,
        task: Task | None = None,
        n_jobs: int = 1,
    ) -> NDArray[np.float64]:
        """Values for other labels of the same rows, from the neighbours that were kept.

        Equal to ``knn_shapley(x, y, truncate=keep)``, without computing a distance; exact where
        all players were kept.

        Parameters
        ----------
        y
            (n,) other labels or numbers.
        y_test
            (m,) of the rows that were asked about, if these were not the training rows.
        task
            Default: as it was judged.
        n_jobs
            Threads, -1 for all cores.

        Returns
        -------
        ndarray
            (n,) values.

        Examples
        --------
        >>> from upweight.valuation import knn_judge
        >>> x = np.append(np.arange(0.0, 6.0), np.arange(50.0, 56.0))[:, None]
        >>> y = np.repeat(["no", "yes"], 6)
        >>> judged = knn_judge(x, y, k=3, keep=11)
        >>> y[3] = "yes"
        >>> int(judged.revalue(y).argmin())
        3
        """
        kept = self.indices.shape[1]
        if kept < self.k:
            raise ValueError(
                f"expected at least k = {self.k} neighbours to value rows by; {kept} were kept: "
                "judge with a larger keep"
            )
        if self.itself != (y_test is None):
            hint = "leave y_test out" if self.itself else "give y_test"
            raise ValueError(f"expected labels of the rows that were asked about: {hint}")
        labels = make_labels(y, self.rows, y_test, len(self.indices), task or self.task)
        total = np.zeros(self.rows)
        for members, (worth, others) in in_order(self._calls(labels), n_jobs):
            total += worth
            total[members] += others
        return total / len(self.indices)

    def _calls(self, labels: Labels) -> Iterator[Callable[[], Any]]:
        kept = self.indices.shape[1]
        for part in range(int(self.parts.max()) + 1):
            rows = np.flatnonzero(self.parts == part)
            members = rows if self.itself else np.arange(self.rows)
            players = len(members) - self.itself
            size = max(1, REVALUED // kept)
            for start in range(0, len(rows), size):
                asked = rows[start : start + size]

                def call(asked: Any = asked, members: Any = members, players: int = players) -> Any:
                    nearest = self.indices[asked]
                    own = asked if self.itself else None
                    return members, labels.worth(
                        labels.given, nearest, asked, own, k=self.k, players=players
                    )

                yield call


@dataclass(frozen=True, eq=False)
class Labels:
    """Codes of labels, or centred numbers: of players (`given`) and of queries (`asked`)."""

    task: Task
    given: NDArray[Any]
    asked: NDArray[Any]
    share: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def worth(
        self,
        given: NDArray[Any],
        nearest: NDArray[np.integer[Any]],
        rows: NDArray[np.intp],
        own: NDArray[np.intp] | None,
        *,
        k: int,
        players: int,
    ) -> tuple[NDArray[np.float64], float]:
        """Σ over some queries of the values of the players, in two summands.

        Parameters
        ----------
        given
            (n,) codes or numbers of the players.
        nearest
            (b, L) places in `given` of those that are nearest to each query.
        rows
            (b,) positions of the queries in `asked`.
        own
            (b,) places in `given` of the queries themselves, where they are there.
        k, players
            K, and how many players there are in the game of one query.

        Returns
        -------
        worth : ndarray
            (n,)
        others : float
            To be added to every one of them.
        """
        asked, known = self.asked[rows], given[nearest]  # (b,), (b, L)
        rest = np.zeros(len(rows))
        if self.task == "classification":
            share = self.share[asked]
            worth = classification_game(known == asked[:, None], share, k, players)
            if nearest.shape[1] < players:  # the others get this; `worth` is what is on top of it
                rest = share / players
                worth -= rest[:, None]
        else:
            worth = regression_game(known, asked, k, players)
        total: Any = np.bincount(nearest.ravel(), worth.ravel(), minlength=len(given))
        if own is not None:
            total[own] -= rest
        return total, float(rest.sum())


def make_labels(
    y: ArrayLike, rows: int, y_test: ArrayLike | None, queries: int, task: Task | None
) -> Labels:
    """Labels of players and queries, checked and encoded; without y_test these are the same."""
    given = targets(y, rows)
    asked = given if y_test is None else targets(y_test, queries, "y_test")
    task = task_of(given, task)
    if _sort(asked) != _sort(given):
        raise ValueError(
            f"expected y_test of the same type as y; got {asked.dtype} and {given.dtype}"
        )
    if task == "regression":
        numbers, others = given.astype(np.float64), asked.astype(np.float64)
        mean = numbers.mean()
        return Labels(task, numbers - mean, others - mean)
    encoded = encode(given)
    codes = encoded.codes
    share = np.bincount(codes) / rows
    if y_test is None:
        return Labels(task, codes, codes, share)
    place = {label: code for code, label in enumerate(encoded.classes.tolist())}
    others = np.array([place.get(label, len(place)) for label in asked.tolist()])
    return Labels(task, codes, others, np.append(share, 0.0))


def _sort(y: NDArray[Any]) -> str:
    return "number" if y.dtype.kind in "biuf" else "time" if y.dtype.kind in "mM" else "text"


def knn_proba(
    indices: ArrayLike, y: ArrayLike, *, k: int | None = None
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """The vote of the nearest rows: p[i, c] = 1/k Σ_{j ≤ k} [y of the j-th nearest of i = c].

    Parameters
    ----------
    indices
        (m, keep) positions of the nearest rows, from `neighbours` or `knn_judge`.
    y
        (n,) labels of the training rows.
    k
        How many of them vote, the nearest first; default all.

    Returns
    -------
    proba : ndarray
        (m, C). Where rows are their own queries it is leave-one-out: no row votes for itself.
    classes : ndarray
        (C,) the sorted labels that the columns stand for.

    Raises
    ------
    ValueError
        If indices point to no row, or y has one class only.

    Examples
    --------
    >>> from upweight.valuation import neighbours
    >>> indices, _ = neighbours([[0.0], [1.0], [3.0]], 2)
    >>> knn_proba(indices, ["a", "a", "b"])[0]
    array([[0.5, 0.5],
           [0.5, 0.5],
           [1. , 0. ]])
    """
    nearest = np.asarray(indices)
    labels = targets(y, None)
    encoded = encode(labels)
    if nearest.ndim != 2 or 0 in nearest.shape or nearest.dtype.kind not in "iu":
        raise ValueError(
            f"expected indices as whole numbers of shape (rows, neighbours); got {nearest.dtype} "
            f"of shape {nearest.shape}"
        )
    if nearest.min() < 0 or nearest.max() >= len(labels):
        raise ValueError(
            f"expected indices from 0 to {len(labels) - 1}, the rows of y; got {nearest.min()} to "
            f"{nearest.max()}"
        )
    k = count(nearest.shape[1] if k is None else k, "k", 1, nearest.shape[1], "as many are known")
    m, classes = len(nearest), len(encoded.classes)
    votes = np.zeros((m, classes))
    for start in range(0, m, 2**17):
        codes = encoded.codes[nearest[start : start + 2**17, :k]]
        cells = codes + classes * np.arange(len(codes))[:, None]
        counted = np.bincount(cells.ravel(), minlength=len(codes) * classes)
        votes[start : start + len(codes)] = counted.reshape(-1, classes)
    votes /= k
    return votes, encoded.classes
