"""Curvatures of the mean loss over other weights of the rows, another one for every column.

    C_j = Σ_i w_ij c_i          c_i the curvature of row i, w_ij = 1/|S_j| for the rows i in S_j

Letters: n rows, p parameters, k columns, each with a set S of kept rows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.form import OutputForm
from upweight.operator import LinearOperator, wide

__all__ = ["Reweighted"]


class Reweighted(LinearOperator):
    """C_j + λI for k sets of kept rows at once: column j of a product is (C_j + λI) v_j.

    Not one matrix but k of them; `conjugate_gradients` takes it all the same, since it never mixes
    columns.

    Parameters
    ----------
    curvature
        An exact curvature of all rows.
    kept
        (n, k) booleans, at least one row in every column.
    damping
        λ.

    Attributes
    ----------
    products
        Columns that it, and what `at` gives of it, have multiplied.

    Raises
    ------
    TypeError
        If the curvature is not one of rows.
    ValueError
        If the masks are not one line for each row, or a column keeps no row.
    """

    def __init__(self, curvature: LinearOperator, kept: Tensor, damping: float) -> None:
        super().__init__(curvature.size, curvature.dtype, curvature.device)
        self.curvature = curvature
        self.damping = damping
        self.semidefinite = curvature.semidefinite
        kept = kept.to(curvature.device)
        if not bool(kept.any(0).all()):
            raise ValueError("expected at least one kept row in every column of the masks")
        counts = kept.to(wide(curvature.dtype, curvature.device))
        self._weights = len(kept) * counts / counts.sum(0)  # n·w, (n, k): forms divide by n
        self._spent = [0]  # shared with what `at` gives
        form = getattr(curvature, "form", None)
        self._form = form if isinstance(form, OutputForm) else None
        self._alone: list[LinearOperator] = []
        risk = getattr(curvature, "risk", None)
        if risk is not None and risk.n != len(kept):
            raise ValueError(f"expected masks of {risk.n} rows (n, k); got {tuple(kept.shape)}")
        if self._form is None:
            on_rows: Any = getattr(curvature, "on_rows", None)
            if on_rows is None:
                raise TypeError(
                    "expected a curvature of some rows (on_rows), as curvature='ggn' has; got "
                    f"{curvature!r}"
                )
            self._alone = [on_rows(rows.nonzero()[:, 0].tolist()) for rows in kept.T]

    @property
    def products(self) -> int:
        """Columns that were multiplied."""
        return self._spent[0]

    def at(self, columns: Tensor) -> Reweighted:
        """The same for some of the columns."""
        other = copy.copy(self)
        other._weights = self._weights[:, columns]
        other._alone = [self._alone[j] for j in columns.tolist()] if self._alone else []
        return other

    def _apply(self, columns: Tensor) -> Tensor:
        k = self._weights.shape[1]
        if columns.shape[1] != k:
            raise ValueError(
                f"expected {k} columns, one for each set of rows; got {columns.shape[1]}"
            )
        self._spent[0] += k
        if self._form is not None:
            product = self._form.product(columns, self._weights).to(self.dtype)
        else:
            parts = [a @ columns[:, j] for j, a in enumerate(self._alone)]
            product = torch.stack(parts, dim=1)
        return product + self.damping * columns
