"""The score of a ridge regression, or ridge probe, that is fitted on a set: in closed form."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.checks import (
    Task,
    check_pairs,
    check_r2,
    codes_in,
    count,
    encode,
    features,
    targets,
    task_of,
)
from upweight.valuation.fingerprints import digest
from upweight.valuation.ridge_fits import RidgeJudge, RidgeRows
from upweight.valuation.scoring import get_scoring
from upweight.valuation.utility import Evaluated, Utility, row_names

__all__ = ["RidgeUtility", "deal", "not_finite"]

REVISION = 1  # raised when the same data get other utilities, so that no cache gives old ones
Floats = NDArray[np.float64]


class RidgeUtility(Utility):
    """u(S): how well a ridge fit on the rows S predicts other rows, in closed form.

    With X the features, Y − ȳ the targets without a fixed offset, and S a set of rows ::

        F_S = ȳ + X_test (X_Sᵀ X_S + α I)⁻¹ X_Sᵀ (Y_S − ȳ)           (m, C)
        u(S) = score(F_S, y_test)

    In a regression, ȳ is the mean of all training targets. In a classification, Y has a column for
    each of C classes, 1 where a row is of it, ȳ = 1/C, and F_S becomes probabilities: negative
    outputs are set to 0, and rows are divided by their sums. ȳ is what a set without rows predicts.

    Parameters
    ----------
    train
        ``(x, y)``: (n, d) features, and (n,) labels of any type that can be sorted or numbers.
    test
        ``(x, y)`` of the rows to predict. Default: every training row is predicted by those of the
        set that are in other folds, u(S) = mean over folds F of the score on F of a fit on S ∖ F.
    scoring
        ``"log_likelihood"`` (default), ``"brier"`` or ``"accuracy"``; in a regression
        ``"neg_mean_squared_error"`` (default) or ``"r2"``. The first two smooth probabilities
        first, see `laplace`.
    alpha
        α > 0, on the scale of standardised features.
    task
        ``"classification"`` or ``"regression"``. Default: regression if y are numbers that are not
        all whole.
    names
        Of the training rows; default the index of x, if it is a frame, or 0, …, n − 1.
    folds, seed
        How many folds where there is no test, stratified by class, and the seed they are drawn by.
    cache
        Default: one in memory.

    Raises
    ------
    ValueError
        If shapes, or names of rows or columns, do not fit, a number is not finite, a label is
        missing or unknown, a setting is out of range, or ``"r2"`` is asked of test rows, or of a
        fold, with one number only.

    Notes
    -----
    Features are standardised by mean and standard deviation of *all* training rows, columns that
    are constant become 0, and a column of ones is added: an intercept, penalised as any weight, so
    that small sets are pulled to ȳ.

    A set is solved on its smaller side: X_Sᵀ X_S + α I is (d, d), X_S X_Sᵀ + α I is (s, s). Sets of
    one size are solved by one call, each of them alone, so that a utility is bitwise the same
    whichever sets are asked for with it. BLAS with another number of threads may change round-off.

    In chains, rows join in blocks of 64. With K the inner products of block and test rows given
    the rows before, and L Lᵀ = K_bb + α I, outputs after the j-th row are ::

        F_j = F_0 + Σ_{i ≤ j} v_i z_iᵀ,    v = L⁻¹ K_b,test,    z = L⁻¹ (Y_b − F_b)

    because a leading part of L is the factor of a leading part of K. Nothing is downdated, so that
    errors do not add up as they do in Sherman and Morrison's formula.

    References
    ----------
    Golub, Van Loan, Matrix Computations, 4th ed., 4.2 (Cholesky factors of leading parts).
    Rasmussen, Williams, Gaussian Processes for Machine Learning, 2006, 2.2 (both sides).

    Examples
    --------
    >>> x = np.append(np.arange(0.0, 6.0), np.arange(10.0, 16.0))[:, None]
    >>> y = np.repeat(["no", "yes"], 6)
    >>> utility = RidgeUtility((x, y), ([[1.0], [13.0]], ["no", "yes"]), "accuracy")
    >>> utility([]), utility([2, 8])
    (0.5, 1.0)
    >>> utility.chains(np.arange(12)[None])[0, [0, 12]]
    array([0.5, 1. ])
    """

    prefer: Literal["threads", "processes"] = "threads"

    def __init__(
        self,
        train: tuple[ArrayLike, ArrayLike],
        test: tuple[ArrayLike, ArrayLike] | None = None,
        scoring: str | None = None,
        *,
        alpha: float = 1.0,
        task: Task | None = None,
        names: Any = None,
        folds: int = 5,
        seed: int = 0,
        cache: UtilityCache | None = None,
    ) -> None:
        check_pairs(train, test)
        x = features(train[0], "the features of train")
        y = targets(train[1], len(x))
        self.n = len(x)
        self.names = row_names(names, self.n, like=train[0])
        self.cache = UtilityCache() if cache is None else cache
        self.task: Task = task_of(y, task)
        default = "log_likelihood" if self.task == "classification" else "neg_mean_squared_error"
        self.scoring = get_scoring(scoring or default, self.task).name
        table, shift, scale = _standardised(x)
        self.alpha = _penalty(alpha, table)
        if self.task == "classification":
            encoded = encode(y)
            wanted: NDArray[Any] = encoded.codes.astype(np.intp)
            offset = np.full(len(encoded.classes), 1 / len(encoded.classes))
            y_all = np.eye(len(offset))[wanted] - offset
        else:
            encoded, wanted = None, y.astype(np.float64)
            offset = np.array([wanted.mean()])
            y_all = (wanted - offset)[:, None]
        self._rows = rows = RidgeRows(table, y_all, self.alpha)
        if test is None:
            fold = deal(self.n, folds, seed, None if encoded is None else wanted)
            self._judges = [
                RidgeJudge(
                    rows, table[fold == k], wanted[fold == k], offset, self.scoring, fold != k
                )
                for k in range(folds)
            ]
        else:
            others = features(test[0], "the features of test", columns=x.shape[1])
            theirs = targets(test[1], len(others), "y of test")
            if encoded is not None:
                asked: NDArray[Any] = codes_in(encoded.classes, theirs)
            else:
                task_of(theirs, "regression")
                asked = theirs.astype(np.float64)
            moved = _with_ones(others, shift, scale)
            inside = np.ones(self.n, np.bool_)
            self._judges = [RidgeJudge(rows, moved, asked, offset, self.scoring, inside)]
        if self.scoring == "r2":
            for judge in self._judges:
                check_r2(judge.wanted, "every fold" if test is None else "the test rows")

    @property
    def fingerprint(self) -> str | None:
        """A digest of data and settings."""
        return self._digest

    @cached_property
    def _digest(self) -> str | None:
        judges = [(judge.x, judge.wanted, judge.inside) for judge in self._judges]
        settings = self.task, self.scoring, self.alpha
        return digest("RidgeUtility", REVISION, *settings, self._rows.x, self._rows.y, judges)

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """All of them, those of one size at once."""
        total = sum(judge.evaluate(masks) for judge in self._judges)
        return not_finite(np.asarray(total) / len(self._judges))

    def chains(self, orders: NDArray[np.intp]) -> Floats:
        """(P, n + 1) utilities of the first 0, 1, …, n rows of each of (P, n) orders."""
        total = sum(judge.chains(orders) for judge in self._judges)
        return np.asarray(total) / len(self._judges)

    def all_but_one(self) -> Floats:
        """(n,) utilities of all rows but the i-th, from one fit on all of them.

        ::

            F_{N∖i} = F_N − (X_test A⁻¹ x_i) r_iᵀ / (1 − h_i),   A = XᵀX + α I,   h_i = x_iᵀ A⁻¹ x_i

        with r_i = y_i − f_N(x_i) what the fit on all rows leaves of row i.

        Examples
        --------
        >>> x, y = np.arange(8.0)[:, None], np.arange(8) ** 2 / 2.0
        >>> utility = RidgeUtility((x, y), (x, y), alpha=0.1)
        >>> bool(np.isclose(utility.all_but_one()[3], utility([0, 1, 2, 4, 5, 6, 7])))
        True
        """
        total = sum(judge.all_but_one() for judge in self._judges)
        return np.asarray(total) / len(self._judges)


def _standardised(x: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Training features with ones, and the shift and scale that they were standardised by."""
    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        shift, scale = wide.mean(axis=0), wide.std(axis=0)
    constant = (wide == wide[0]).all(axis=0)
    if not np.isfinite(scale).all():
        raise ValueError("expected features whose squares are finite; got larger ones: scale them")
    scale[constant | (scale == 0)] = np.inf
    return _with_ones(x, shift, scale), shift, scale


def _with_ones(x: NDArray[Any], shift: Floats, scale: Floats) -> Floats:
    moved = (x.astype(np.float64) - shift) / scale
    return np.column_stack([moved, np.ones(len(x))])


def _penalty(alpha: float, x: Floats) -> float:
    """A penalty that is more than the round-off of XᵀX, else a ValueError."""
    least = 1e-13 * float((x * x).sum())
    if not (isinstance(alpha, (int, float, np.number)) and least <= alpha < np.inf):
        raise ValueError(
            f"expected alpha above 0, for these rows at least {least:.1e}, below which the "
            f"solution is not determined in float64; got {alpha!r}"
        )
    return float(alpha)


def deal(n: int, folds: int, seed: int, codes: NDArray[np.intp] | None) -> NDArray[np.intp]:
    """(n,) the fold of each row, 0 … folds − 1: nearly equal ones, also within each class."""
    folds = count(folds, "folds", 2, n, "at most one for each row")
    shuffled = np.random.default_rng(count(seed, "seed", 0)).permutation(n)
    if codes is not None:
        shuffled = shuffled[np.argsort(codes[shuffled], kind="stable")]
    fold = np.empty(n, np.intp)
    fold[shuffled] = np.arange(n) % folds
    return fold


def not_finite(values: Floats) -> Evaluated:
    """Numbers that are not finite as failures."""
    wrong = np.flatnonzero(~np.isfinite(values))
    errors = {int(i): f"gave {values[i]}" for i in wrong}
    return Evaluated(np.where(np.isfinite(values), values, np.nan), errors)
