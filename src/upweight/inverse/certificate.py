"""How exact a damped inverse was on the right-hand sides it was given."""

from __future__ import annotations

import html
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Certificate",
    "IndefiniteCurvatureWarning",
    "ResidualWarning",
    "relative_residuals",
    "warn_of_residuals",
]

# A solve that leaves more than this is told: float32 gradients are not known better.
RESIDUAL_LIMIT = 1e-6


class IndefiniteCurvatureWarning(UserWarning):
    """A + λI has negative eigenvalues: its inverse is not that of a minimum."""


class ResidualWarning(UserWarning):
    """A solve left a larger residual than round-off in the gradients would explain."""


@dataclass
class Certificate:
    """What can be said of the solves (A + λI) X = B so far.

    Attributes
    ----------
    method, damping, parameters
        Of the inverse.
    columns
        How many right-hand sides were solved for.
    residual_max, residual_mean
        ‖(A + λI)x − b‖ / ‖b‖ over those right-hand sides; 0 for b = 0.
    products
        Directional derivatives of all training rows that the curvature took: one for each column
        it was multiplied with; for a dense form as many as its fastest way needs, which may be far
        fewer than p.
    coverage
        The share of the parameters in θ that the curvature knows of.
    facts
        What else the method found: the factorisation, negative eigenvalues, …
    notes
        Warnings and slower ways taken, in words.

    Examples
    --------
    >>> print(Certificate("direct", 0.1, 3, columns=2, residual_max=1e-16))
    method              direct
    damping             0.1
    parameters          3
    right-hand sides    2
    largest residual    1.0e-16
    mean residual       0.0e+00
    curvature products  0
    coverage            100.0 %
    """

    method: str
    damping: float
    parameters: int
    columns: int = 0
    residual_max: float = 0.0
    residual_mean: float = 0.0
    products: int = 0
    coverage: float = 1.0
    facts: dict[str, Any] = field(default_factory=lambda: {})
    notes: list[str] = field(default_factory=lambda: [])

    def add(self, residuals: Tensor) -> None:
        """Count the relative residuals (k,) of k more right-hand sides."""
        k = residuals.numel()
        if k:
            total = self.residual_mean * self.columns + float(residuals.sum())
            self.columns += k
            self.residual_mean = total / self.columns
            self.residual_max = max(self.residual_max, float(residuals.max()))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**self.__dict__, "facts": dict(self.facts), "notes": list(self.notes)}

    def lines(self) -> list[tuple[str, str]]:
        """Label and value of every line of the printed table."""
        lines = [
            ("method", self.method),
            ("damping", f"{self.damping:g}"),
            ("parameters", f"{self.parameters:,}"),
            ("right-hand sides", f"{self.columns:,}"),
            ("largest residual", f"{self.residual_max:.1e}"),
            ("mean residual", f"{self.residual_mean:.1e}"),
            ("curvature products", f"{self.products:,}"),
            ("coverage", f"{100 * self.coverage:.1f} %"),
        ]
        lines += [(name, str(value)) for name, value in self.facts.items()]
        return lines + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.lines()) + 2
        return "\n".join(f"{label:<{width}}{value}" for label, value in self.lines())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>"
            for a, b in self.lines()
        )
        return f"<table>{rows}</table>"


def warn_of_residuals(residuals: Tensor, stacklevel: int) -> None:
    """Tell of right-hand sides that were not solved to `RESIDUAL_LIMIT`."""
    worst = float(residuals.max()) if residuals.numel() else 0.0
    if not worst <= RESIDUAL_LIMIT:
        warnings.warn(
            f"solved only to a relative residual of {worst:.1e}: the matrix is close to singular. "
            "Choose a larger damping",
            ResidualWarning,
            stacklevel=stacklevel + 1,
        )


def relative_residuals(residual: Tensor, right: Tensor) -> Tensor:
    """‖r_j‖ / ‖b_j‖ for every column, and 0 where b_j = r_j = 0."""
    size = torch.linalg.vector_norm(right, dim=0)
    rest = torch.linalg.vector_norm(residual, dim=0)
    return torch.where(rest == 0, torch.zeros_like(rest), rest / size)
