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
from upweight.operator import LinearOperator

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

    Raises
    ------
    TypeError
        If the curvature is not one of rows.
    """

    def __init__(self, curvature: LinearOperator, kept: Tensor, damping: float) -> None:
        super().__init__(curvature.size, curvature.dtype, curvature.device)
        self.curvature = curvature
        self.damping = damping
        self.semidefinite = curvature.semidefinite
        self._kept = kept.to(curvature.device)
        self._weights = kept / kept.sum(0)
        form = getattr(curvature, "form", None)
        self._form = form if isinstance(form, OutputForm) else None
        self._alone: list[LinearOperator] = []
        if self._form is None:
            on_rows: Any = getattr(curvature, "on_rows", None)
            if on_rows is None:
                raise TypeError(
                    "expected a curvature of some rows (on_rows), as curvature='ggn' has; got "
                    f"{curvature!r}"
                )
            self._alone = [on_rows(rows.nonzero()[:, 0].tolist()) for rows in kept.T]

    def at(self, columns: Tensor) -> Reweighted:
        """The same for some of the columns."""
        other = copy.copy(self)
        other._kept = self._kept[:, columns]
        other._weights = self._weights[:, columns]
        other._alone = [self._alone[j] for j in columns.tolist()] if self._alone else []
        return other

    def _apply(self, columns: Tensor) -> Tensor:
        if columns.shape[1] != self._kept.shape[1]:
            raise ValueError(
                f"expected {self._kept.shape[1]} columns, one for each set of rows; got "
                f"{columns.shape[1]}"
            )
        if self._form is not None:
            n = self._kept.shape[0]
            product = self._form.product(columns, n * self._weights).to(self.dtype)
        else:
            parts = [a @ columns[:, j] for j, a in enumerate(self._alone)]
            product = torch.stack(parts, dim=1)
        return product + self.damping * columns
