"""How exact a damped inverse was on the right-hand sides it was given."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from upweight.frames import users_frame

__all__ = [
    "Certificate",
    "DivergenceError",
    "IndefiniteCurvatureWarning",
    "NegativeCurvatureError",
    "ResidualWarning",
    "check_damping",
    "relative_residuals",
    "warn_of_indefinite",
    "warn_of_residuals",
]


class IndefiniteCurvatureWarning(UserWarning):
    """A + λI has negative eigenvalues: its inverse is not that of a minimum."""


class ResidualWarning(UserWarning):
    """A solve left a larger residual than it should have."""


class NegativeCurvatureError(ArithmeticError):
    """A method that needs a positive definite A + λI met a direction v with vᵀ(A + λI)v ≤ 0."""


class DivergenceError(ArithmeticError):
    """An iteration moved away from the solution."""


@dataclass
class Certificate:
    """What can be said of the solves (A + λI) X = B so far.

    Attributes
    ----------
    method, damping, parameters
        Of the inverse. One damping, or one for every named block of parameters.
    columns
        How many right-hand sides were solved for.
    measured
        For how many of them the residual was measured.
    residual_max, residual_mean
        ‖(A + λI)x − b‖ / ‖b‖ over those, with A the exact curvature that was asked for; 0 for
        b = 0. An approximate method leaves about as much as it is wrong: 0 is exact, and 1 no
        better than x = 0.
    steps
        Of an iteration: the most that any right-hand side took.
    converged
        Of an iteration: whether all right-hand sides reached the tolerance.
    products
        Directional derivatives of all training rows that the curvature took: one for each column
        it was multiplied with; for a dense form as many as its fastest way needs, which may be far
        fewer than p.
    coverage
        The share of the parameters in θ that the method has factors for.
    facts
        What else the method found: the factorisation, negative eigenvalues, …
    notes
        Warnings and slower ways taken, in words.

    Examples
    --------
    >>> print(Certificate("direct", 0.1, 3, columns=2, measured=2, residual_max=1e-16))
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
    damping: float | Mapping[str, float]
    parameters: int
    columns: int = 0
    measured: int = 0
    residual_max: float = 0.0
    residual_mean: float = 0.0
    steps: int | None = None
    converged: bool | None = None
    products: int = 0
    coverage: float = 1.0
    facts: dict[str, Any] = field(default_factory=lambda: {})
    notes: list[str] = field(default_factory=lambda: [])

    def add(self, residuals: Tensor, columns: int | None = None) -> None:
        """Count k more right-hand sides, of which these relative residuals (≤ k,) are known."""
        known = residuals.numel()
        self.columns += known if columns is None else columns
        if known:
            residuals = torch.nan_to_num(residuals, nan=float("inf"), posinf=float("inf"))
            total = self.residual_mean * self.measured + float(residuals.sum())
            self.measured += known
            self.residual_mean = total / self.measured
            self.residual_max = max(self.residual_max, float(residuals.max()))

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Label and value of every line of the printed table."""
        damping = self.damping
        told = (
            ", ".join(f"{name}: {value:g}" for name, value in damping.items())
            if isinstance(damping, Mapping)
            else f"{damping:g}"
        )
        lines = [
            ("method", self.method),
            ("damping", told),
            ("parameters", f"{self.parameters:,}"),
            ("right-hand sides", f"{self.columns:,}"),
        ]
        if self.measured:
            of = "" if self.measured == self.columns else f" (of {self.measured:,} measured)"
            lines.append(("largest residual", f"{self.residual_max:.1e}{of}"))
            lines.append(("mean residual", f"{self.residual_mean:.1e}"))
        else:
            lines.append(("residual", "not measured"))
        if self.steps is not None:
            lines.append(("steps", f"{self.steps:,}"))
        if self.converged is not None:
            lines.append(("converged", "yes" if self.converged else "no"))
        lines.append(("curvature products", f"{self.products:,}"))
        lines.append(("coverage", f"{100 * self.coverage:.1f} %"))
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


def check_damping(damping: float) -> None:
    """Refuse a damping that is not a finite number ≥ 0."""
    if not isinstance(damping, int | float) or isinstance(damping, bool):
        raise TypeError(f"expected a number for the damping λ; got {damping!r}")
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"expected a damping λ ≥ 0; got {damping}")


def relative_residuals(residual: Tensor, right: Tensor) -> Tensor:
    """‖r_j‖ / ‖b_j‖ for every column, and 0 where b_j = r_j = 0."""
    size = torch.linalg.vector_norm(right, dim=0)
    rest = torch.linalg.vector_norm(residual, dim=0)
    return torch.where(rest == 0, torch.zeros_like(rest), rest / size)


def warn_of_indefinite(certificate: Certificate, shifted: Tensor, damping: float) -> None:
    """Tell of negative ones among the eigenvalues A + λI that were found."""
    negative = int((shifted < 0).sum())
    certificate.facts["negative eigenvalues"] = negative
    lowest = float(shifted.min())
    certificate.facts["smallest eigenvalue"] = f"{lowest:.3g}"
    if negative:
        certificate.note("A + λI is indefinite")
        warnings.warn(
            f"A + {damping:g}·I is indefinite: {negative} of its {len(shifted)} eigenvalues are "
            f"negative, the lowest {lowest:.3g}. Its inverse is that of a saddle, and scores need "
            "not predict retraining; the GGN is never negative, nor is the Hessian with a damping "
            f"above {damping - lowest:.3g}",
            IndefiniteCurvatureWarning,
            stacklevel=users_frame(),
        )


def warn_of_residuals(residuals: Tensor, limit: float, why: str) -> None:
    """Tell of right-hand sides whose residual is above a limit, and why it may be."""
    worst = float(residuals.max()) if residuals.numel() else 0.0  # NaN if one is
    if not worst <= limit:
        warnings.warn(
            f"solved only to a relative residual of {worst:.1e}: {why}",
            ResidualWarning,
            stacklevel=users_frame(),
        )
