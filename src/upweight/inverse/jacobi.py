"""The damped inverse of the diagonal of A, the cheapest preconditioner.

    (A + λI)⁻¹ ≈ diag(1/(d + λ)),        d = diag(A), or its estimate from random signs z:
    d ≈ Σ z ∘ (Az) / Σ z ∘ z

References
----------
C. Bekas, E. Kokiopoulou, Y. Saad, *An estimator for the diagonal of a matrix* (2007), §2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.inverse.approximate import ApproximateInverse, products_spent
from upweight.inverse.certificate import Certificate, check_damping
from upweight.operator import Diagonal, LinearOperator, wide

__all__ = ["JacobiFactors", "hutchinson_diagonal"]

# Numbers of the sign vectors that are held at once, unless one alone has more.
PROBED_NUMBERS = 2**23


def hutchinson_diagonal(operator: LinearOperator, probes: int, seed: int = 0) -> Tensor:
    """An unbiased estimate (p,) of the diagonal from products with `probes` random sign vectors."""
    generator = torch.Generator().manual_seed(seed)
    kind = wide(operator.dtype, operator.device)
    total = torch.zeros(operator.size, dtype=kind, device=operator.device)
    some = max(1, min(probes, PROBED_NUMBERS // operator.size))
    for start in range(0, probes, some):
        # drawn one by one, so that they do not depend on how many are held at once
        drawn = [
            torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)
            for _ in range(start, min(start + some, probes))
        ]
        columns = torch.stack(drawn, dim=1).to(operator.device, kind).mul_(2).sub_(1)
        total += (columns * (operator @ columns)).sum(1)
    return total / probes


class JacobiFactors:
    """The diagonal of A: exact, or estimated from some products.

    Parameters
    ----------
    operator
        A.
    probes
        Random sign vectors for an estimate; None for the exact diagonal.
    seed
        Of the sign vectors.
    """

    method = "jacobi"

    def __init__(
        self, operator: LinearOperator, probes: int | None = None, *, seed: int = 0
    ) -> None:
        if probes is not None and probes < 1:
            raise ValueError(f"expected at least one probe, or None; got {probes}")
        self.operator = operator
        kind = wide(operator.dtype, operator.device)
        found = (
            operator.diagonal() if probes is None else hutchinson_diagonal(operator, probes, seed)
        )
        # a curvature may be negative there, and an estimate by chance
        self.diagonal = found.to(kind).clamp(min=0.0)
        self.exact = probes is None

    def inverse(self, damping: float) -> ApproximateInverse:
        """diag(1/(d + damping))."""
        check_damping(damping)
        shifted = self.diagonal + damping
        smallest, largest = float(shifted.min()), float(shifted.max())
        if smallest <= torch.finfo(shifted.dtype).eps * largest:
            raise ValueError(
                "the diagonal of A + λI has zeros, so it has no inverse. Choose a damping above 0"
            )
        certificate = Certificate(self.method, damping, self.operator.size)
        certificate.products = products_spent(self.operator)
        certificate.facts["diagonal"] = "exact" if self.exact else "estimated"
        damped = self.operator.damped(damping)
        return ApproximateInverse(Diagonal(1.0 / shifted), damped, certificate)

    def preconditioner(self, damping: float) -> LinearOperator:
        """diag(1/(d + damping))."""
        return self.inverse(damping).inner
