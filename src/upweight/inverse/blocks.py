"""The damped inverse of a matrix whose blocks of parameters do not see each other.

(blockdiag(A_1, …, A_B) + diag(λ_1 I, …, λ_B I))⁻¹ = blockdiag((A_1 + λ_1 I)⁻¹, …)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upweight.inverse.approximate import (
    ApproximateInverse,
    Prepared,
    as_preconditioner,
    products_spent,
)
from upweight.inverse.certificate import Certificate, check_damping
from upweight.operator import BlockDiagonal, Diagonal, LinearOperator

__all__ = ["BlockFactors"]


class BlockFactors:
    """Prepared methods, one for each block of parameters.

    Parameters
    ----------
    operator
        The whole of A, which residuals are measured against: what the blocks leave out of it shows.
    prepared
        By the name of the block.
    entries
        For every block, where its parameters are in θ.
    """

    def __init__(
        self,
        operator: LinearOperator,
        prepared: Mapping[str, Prepared],
        entries: Sequence[Tensor],
    ) -> None:
        self.operator = operator
        self.prepared = dict(prepared)
        self.entries = tuple(entries)

    def inverse(self, damping: float | Mapping[str, float]) -> ApproximateInverse:
        """The inverse with one damping, or with one for every block by name.

        Raises
        ------
        ValueError
            If a block has no damping, or a damping no block.
        """
        dampings = self._dampings(damping)
        inverses = {name: part.inverse(dampings[name]) for name, part in self.prepared.items()}
        method = "+".join(dict.fromkeys(i.certificate.method for i in inverses.values()))
        certificate = Certificate(method, damping, self.operator.size)
        certificate.facts["blocks"] = f"{len(inverses)}: {', '.join(inverses)}"
        parts = [inverse.certificate for inverse in inverses.values()]
        _join(certificate, parts)
        shift = torch.empty(self.operator.size, dtype=self.operator.dtype)
        for name, entries in zip(self.prepared, self.entries, strict=True):
            own = getattr(self.prepared[name], "shift", None)
            shift[entries.cpu()] = dampings[name] if own is None else own(dampings[name]).cpu()
        damped = self.operator + Diagonal(shift.to(self.operator.device))
        solve = BlockDiagonal(list(inverses.values()), self.entries)
        outside = products_spent(self.operator)

        def refresh(whole: Certificate) -> None:
            _join(whole, parts)
            whole.products += products_spent(self.operator) - outside

        return ApproximateInverse(solve, damped, certificate, refresh)

    def preconditioner(self, damping: float | Mapping[str, float]) -> LinearOperator:
        """The preconditioners of the blocks."""
        dampings = self._dampings(damping)
        parts = [as_preconditioner(part, dampings[name]) for name, part in self.prepared.items()]
        return BlockDiagonal(parts, self.entries)

    def __copy__(self) -> BlockFactors:
        parts = {name: copy.copy(part) for name, part in self.prepared.items()}
        return BlockFactors(self.operator, parts, self.entries)

    @property
    def waits(self) -> bool:
        """Whether a block should not be computed before a start vector is known."""
        return any(getattr(part, "waits", False) for part in self.prepared.values())

    def check(self, damping: float | Mapping[str, float]) -> None:
        """Refuse dampings that do not fit the blocks, or that a block's method refuses."""
        dampings = self._dampings(damping)
        for name, part in self.prepared.items():
            check = getattr(part, "check", None)
            if check is not None:
                check(dampings[name])

    def inform(self, start: Tensor) -> bool:
        """Hand every block its part of a start vector (p,); whether that changes anything."""
        changed = False
        for part, entries in zip(self.prepared.values(), self.entries, strict=True):
            inform = getattr(part, "inform", None)
            if inform is not None:
                changed |= inform(start[entries])
        return changed

    def _dampings(self, damping: float | Mapping[str, float]) -> dict[str, float]:
        if not isinstance(damping, Mapping):
            check_damping(damping)
            return dict.fromkeys(self.prepared, float(damping))
        if set(damping) != set(self.prepared):
            raise ValueError(
                f"expected one damping for each of the blocks {list(self.prepared)}; "
                f"got {list(damping)}"
            )
        for value in damping.values():
            check_damping(value)
        return dict(damping)


def _join(whole: Certificate, parts: Sequence[Certificate]) -> None:
    """What the certificates of the blocks say together."""
    steps = [part.steps for part in parts if part.steps is not None]
    whole.steps = max(steps) if steps else None
    converged = [part.converged for part in parts if part.converged is not None]
    whole.converged = all(converged) if converged else None
    whole.products = sum(part.products for part in parts)
    whole.coverage = sum(part.coverage * part.parameters for part in parts) / whole.parameters
    if any(part.measured for part in parts):
        within = max(part.residual_max for part in parts)
        whole.facts["largest residual within a block"] = f"{within:.1e}"
    for part in parts:
        for note in part.notes:
            whole.note(note)
