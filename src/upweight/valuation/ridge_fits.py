"""Ridge fits on many sets of rows, each exact and each alone, and the scores of what they predict.

Letters: n training rows, s of them in a set, d features with the constant, m test rows, C outputs
(classes, or 1 in a regression), M sets, P orders of T rows, b rows in a block of an order.
Outputs are (…, C, m), so that loops over test rows are the inner ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.scoring import score_many

__all__ = ["RidgeJudge", "RidgeRows"]

Floats = NDArray[np.float64]

AT_ONCE = 2**22  # bytes of the arrays of the sets, or orders, that are solved at once
KEPT = 2**28  # bytes of inner products that are kept
BLOCK = 64  # rows of an order that join at once
WIDE = 128  # features from which looking up an inner product beats computing it
LOOKED_AT = 2**15  # outputs of an order that are scored at once


@dataclass(frozen=True, eq=False)
class RidgeRows:
    """Training rows: features (n, d) with a column of ones, targets (n, C) without the offset."""

    x: Floats
    y: Floats
    alpha: float

    @cached_property
    def gram(self) -> Floats | None:
        """(n, n) inner products of rows, where they pay and fit."""
        n, d = self.x.shape
        return self.x @ self.x.T if d > WIDE and 8 * n * n <= KEPT else None

    def inner(self, chosen: NDArray[np.intp]) -> Floats:
        """(b, s, s) inner products within each of the (b, s) sets."""
        if self.gram is not None:
            return self.gram[chosen[:, :, None], chosen[:, None, :]]
        x = self.x.take(chosen, axis=0)
        return x @ turned(x)


@dataclass(frozen=True, eq=False)
class RidgeJudge:
    """Test rows, and which training rows may be used to predict them.

    Attributes
    ----------
    rows
        The training rows.
    x, wanted
        (m, d) features and (m,) codes or numbers of the test rows.
    offset
        (C,) what no rows predict.
    scoring
        The name of a score.
    inside
        (n,) True for training rows that may be used.
    """

    rows: RidgeRows
    x: Floats
    wanted: NDArray[Any]
    offset: Floats
    scoring: str
    inside: NDArray[np.bool_]

    @cached_property
    def xt(self) -> Floats:
        """(d, m): products with it are several times faster than with the transposed view."""
        return np.ascontiguousarray(self.x.T)

    @cached_property
    def cross(self) -> Floats | None:
        """(n, m) inner products of training and test rows, where they fit."""
        n, m = len(self.rows.x), len(self.x)
        return self.rows.x @ self.xt if 8 * n * m <= KEPT else None

    @property
    def outputs(self) -> int:
        """C m."""
        return len(self.x) * len(self.offset)

    def score(self, outputs: Floats, sizes: Any) -> Floats:
        """(…, C, m) outputs, with the offset → (…,), after fits on so many rows."""
        if len(self.offset) == 1:
            return score_many(self.scoring, outputs[..., 0, :], self.wanted)
        m, c = len(self.x), len(self.offset)
        # an array of zeros, as numpy compares with the number 0 several times slower
        proba = np.maximum(outputs, np.zeros(m))
        total = proba.sum(axis=-2, keepdims=True)  # ≥ 1, as outputs sum to 1
        if self.scoring == "log_likelihood":  # only needs those of the right class
            own = proba[..., self.wanted, np.arange(m)] / total[..., 0, :]
            s = np.asarray(sizes, np.float64)[..., None]
            return np.log((s * own + 1.0) / (s + c)).sum(axis=-1) / m  # as `laplace` has it
        proba /= total
        return score_many(self.scoring, turned(proba), self.wanted, sizes)

    def evaluate(self, masks: NDArray[np.bool_]) -> Floats:
        """(M,) scores of fits on the sets (M, n)."""
        masks = masks & self.inside
        sizes, values = masks.sum(axis=1), np.empty(len(masks))
        for s in np.unique(sizes).tolist():
            alike, side = np.flatnonzero(sizes == s), min(s, self.rows.x.shape[1])
            one = 8 * (s * (len(self.x) + side) + 2 * side * side + 5 * self.outputs)
            step = max(1, AT_ONCE // one)
            for part in (alike[i : i + step] for i in range(0, len(alike), step)):
                chosen = np.nonzero(masks[part])[1].reshape(len(part), s)
                outputs = self._predict(chosen)
                outputs += self.offset[:, None]
                values[part] = self.score(outputs, s)
        return values

    def _predict(self, chosen: NDArray[np.intp]) -> Floats:
        """(b, C, m) outputs of the fits on (b, s) rows."""
        rows, (_, s) = self.rows, chosen.shape
        if s < rows.x.shape[1]:  # Y_Sᵀ (X_S X_Sᵀ + α I)⁻¹ X_S X_testᵀ
            kernel = ridged(rows.inner(chosen), rows.alpha)
            dual = np.linalg.solve(kernel, rows.y.take(chosen, axis=0))
            if self.cross is not None:
                return turned(dual) @ self.cross.take(chosen, axis=0)
            return (turned(dual) @ rows.x.take(chosen, axis=0)) @ self.xt
        x = rows.x.take(chosen, axis=0)  # Y_Sᵀ X_S (X_Sᵀ X_S + α I)⁻¹ X_testᵀ
        a = ridged(turned(x) @ x, rows.alpha)
        return turned(np.linalg.solve(a, turned(x) @ rows.y.take(chosen, axis=0))) @ self.xt

    def chains(self, orders: NDArray[np.intp]) -> Floats:
        """(P, n + 1) scores of fits on the first 0, 1, …, n rows of each order."""
        p, n = orders.shape
        used = self.inside[orders]
        mine = orders[used].reshape(p, -1)
        (t, d), m = (mine.shape[1], self.rows.x.shape[1]), len(self.x)
        # multiplications for a row: T²/6 + T m/2, or about 2 d² + 2 d m
        dual = 4 * d > t and 8 * t * (t + m) <= KEPT
        one = t * (t + m) if dual else 2 * d * (d + BLOCK + m)
        step = max(1, AT_ONCE // (16 * one + 40 * min(BLOCK, self._steps) * self.outputs))
        values = np.empty((p, t + 1))
        values[:, 0] = self.score(self._nothing(1)[0], 0)
        for i in range(0, p, step):
            part = mine[i : i + step]
            blocks = self._dual_blocks(part) if dual else self._primal_blocks(part)
            values[i : i + step, 1:] = self._grow(blocks, len(part), t)
        before = np.zeros((p, n + 1), np.intp)
        np.cumsum(used, axis=1, out=before[:, 1:])
        return np.take_along_axis(values, before, axis=1)

    def _nothing(self, p: int) -> Floats:
        return np.tile(self.offset[:, None], (p, 1, len(self.x)))

    @property
    def _steps(self) -> int:
        """Rows after which outputs are looked at together: such that they stay in the cache."""
        return max(1, LOOKED_AT // self.outputs)

    def _grow(self, blocks: Iterator[tuple[Floats | None, Any, Any]], p: int, t: int) -> Floats:
        """(P, T) scores after each row, from what each row adds to the outputs."""
        values, now, at = np.empty((p, t)), self._nothing(p), 0
        for start, v, z in blocks:  # (P, C, m), (P, b, m), (P, b, C)
            if start is not None:
                now = start + self.offset[:, None]
            for i in range(0, v.shape[1], self._steps):
                part = slice(i, i + self._steps)
                grown: Any = z[:, part, :, None] * v[:, part, None, :]  # (P, ≤ steps, C, m)
                grown[:, 0] += now
                for j in range(1, grown.shape[1]):
                    grown[:, j] += grown[:, j - 1]
                now, end = grown[:, -1], at + grown.shape[1]
                values[:, at:end] = self.score(grown, np.arange(at + 1, end + 1))
                at = end
        return values

    def _dual_blocks(self, orders: NDArray[np.intp]) -> Iterator[tuple[None, Any, Any]]:
        """Blocks of L⁻¹ K_test and L⁻¹ Y with L Lᵀ = K + α I, all rows by all rows."""
        rows, (p, t), m = self.rows, orders.shape, len(self.x)
        table = np.empty((p, t, t + m + len(self.offset)))  # K | K_test | Y
        table[:, :, :t] = ridged(rows.inner(orders), rows.alpha)
        at = rows.x[orders] @ self.xt if self.cross is None else self.cross[orders]
        table[:, :, t : t + m] = at
        table[:, :, t + m :] = rows.y[orders]
        for a in range(0, t, BLOCK):
            b = min(BLOCK, t - a)
            factor = np.linalg.cholesky(table[:, a : a + b, a : a + b])
            right: Any = np.linalg.solve(factor, table[:, a : a + b, a + b :])
            rest = t - a - b
            yield None, right[:, :, rest : rest + m], right[:, :, rest + m :]
            if rest:
                table[:, a + b :, a + b :] -= turned(right[:, :, :rest]) @ right

    def _primal_blocks(self, orders: NDArray[np.intp]) -> Iterator[tuple[Floats, Any, Any]]:
        """The same from A = XᵀX + α I of the rows before each block, which is summed afresh."""
        rows, (p, t), (m, d) = self.rows, orders.shape, self.x.shape
        a = np.tile(rows.alpha * np.eye(d), (p, 1, 1))
        xy = np.zeros((p, d, len(self.offset)))
        for chosen in (orders[:, i : i + BLOCK] for i in range(0, t, BLOCK)):
            x, y = rows.x.take(chosen, axis=0), rows.y.take(chosen, axis=0)
            b = x.shape[1]
            solved: Any = np.linalg.solve(a, np.concatenate([turned(x), xy], axis=2))
            toward, weights = solved[:, :, :b], solved[:, :, b:]  # A⁻¹ X_bᵀ, A⁻¹ XᵀY
            factor = np.linalg.cholesky(ridged(x @ toward, 1.0))
            at = turned(toward) @ self.xt  # (P, b, m)
            right: Any = np.linalg.solve(factor, np.concatenate([at, y - x @ weights], axis=2))
            yield turned(weights) @ self.xt, right[:, :, :m], right[:, :, m:]
            a += turned(x) @ x
            xy += turned(x) @ y

    def all_but_one(self) -> Floats:
        """(n,) scores of fits on all rows but one; of all, where that one may not be used."""
        rows, members = self.rows, np.flatnonzero(self.inside)
        x, y = rows.x[members], rows.y[members]
        if len(x) < x.shape[1]:  # 1 − h = α diag (K + α I)⁻¹, r = α (K + α I)⁻¹ Y
            inverse: Any = np.linalg.inv(ridged(x @ x.T, rows.alpha))
            rest, left = inverse @ y, inverse.diagonal()
            moves, outputs = inverse @ (x @ self.xt), (rest.T @ x) @ self.xt
        else:
            toward: Any = np.linalg.solve(ridged(x.T @ x, rows.alpha), x.T)  # A⁻¹ Xᵀ
            weights = toward @ y
            rest, left = y - x @ weights, 1 - np.einsum("ij,ji->i", x, toward)
            moves, outputs = toward.T @ self.xt, weights.T @ self.xt
        outputs = outputs + self.offset[:, None]
        rest = rest / left[:, None]
        values = np.full(len(rows.x), self.score(outputs, len(x)))
        step = max(1, LOOKED_AT // self.outputs)
        for i in range(0, len(x), step):
            part = slice(i, i + step)
            without = outputs - rest[part, :, None] * moves[part, None, :]
            values[members[part]] = self.score(without, len(x) - 1)
        return values


def ridged(a: Floats, alpha: float) -> Floats:
    """A + α I for a stack of matrices, in place."""
    side = np.arange(a.shape[-1])
    a[..., side, side] += alpha
    return a


def turned(a: Any) -> Any:
    """Transposed matrices of a stack: a view."""
    return a.swapaxes(-1, -2)
