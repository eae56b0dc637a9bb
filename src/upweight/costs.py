"""What a method will cost, in operations and bytes, before anything runs.

Letters: n rows, p parameters, K roots per row, m test rows, o/i outputs/inputs of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PILOT_RTOL", "Cost", "Workload"]

PILOT_RTOL = 1e-5

NUMBER = 8  # bytes: factorisations and solutions are kept in float64


@dataclass(frozen=True)
class Workload:
    """The sizes that costs depend on.

    Attributes
    ----------
    n, p, m
        Training rows, parameters, right-hand sides (test rows).
    roots
        K, the roots of one row's output curvature: for cross-entropy the number of classes.
    layers
        (o, i) of every parameter with two dimensions or more, as a matrix.
    dense
        Whether the curvature is written out by products of small matrices (`curvature.linear`).
    gram
        Whether the curvature offers its roots RᵀR, of n·K rows.
    condition
        (λ_max + λ)/λ, estimated.
    pilot_steps
        Steps of conjugate gradients to 1e-5 for one right-hand side over some of the rows.
    """

    n: int
    p: int
    m: int
    roots: int
    layers: tuple[tuple[int, int], ...]
    dense: bool
    gram: bool
    condition: float
    pilot_steps: int

    @property
    def solved_bytes(self) -> int:
        """The test gradients and their solutions."""
        return 2 * NUMBER * self.p * self.m

    def cg_steps(self, rtol: float) -> int:
        """Steps of conjugate gradients: those of the pilot, for another tolerance."""
        return max(1, math.ceil(self.pilot_steps * math.log(2 / rtol) / math.log(2 / PILOT_RTOL)))

    def chebyshev_steps(self, rtol: float) -> int:
        """½√κ ln(2/rtol), the bound for polynomials that know the ends of the spectrum only."""
        return max(1, math.ceil(0.5 * self.condition**0.5 * math.log(2 / rtol)))


@dataclass(frozen=True)
class Cost:
    """Fit and solve together.

    Attributes
    ----------
    products
        Directional derivatives of all training rows: one for each column that C multiplies.
    calls
        In how many rounds, one after the other.
    flops
        Operations beside them.
    memory
        Bytes that are held at once, beside model and data.
    note
        What the estimate rests on.
    """

    products: float
    calls: float
    flops: float
    memory: float
    note: str = ""
