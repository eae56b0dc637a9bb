"""Recipes for the damped inverse: what to compute, as small frozen dataclasses that compose.

``prepare(curvature)`` does everything that does not depend on the damping; ``.inverse(damping)`` of
the result is the operator (C + λI)⁻¹ with its certificate. Any recipe can precondition `CG`.
"""

from __future__ import annotations

from collections.abc import Callable

from upweight.recipes.base import Recipe
from upweight.recipes.exact import CG, Direct, LiSSA
from upweight.recipes.kronecker import EKFAC, KFAC
from upweight.recipes.lowrank import Arnoldi, Jacobi, Nystroem

__all__ = [
    "CG",
    "EKFAC",
    "KFAC",
    "METHODS",
    "Arnoldi",
    "Direct",
    "Jacobi",
    "LiSSA",
    "Nystroem",
    "Recipe",
    "choose_recipe",
]

METHODS: dict[str, Callable[[], Recipe]] = {
    "direct": Direct,
    "cg": CG,
    "lissa": LiSSA,
    "arnoldi": Arnoldi,
    "nystroem": Nystroem,
    "jacobi": Jacobi,
    "kfac": KFAC,
    "ekfac": EKFAC,
}


def choose_recipe(choice: str | Recipe, what: str = "method") -> Recipe:
    """A recipe from itself or from its name."""
    if isinstance(choice, str):
        if choice not in METHODS:
            known = [*sorted(METHODS), "auto"] if what == "method" else sorted(METHODS)
            raise ValueError(f"expected {what} to be one of {known}; got {choice!r}")
        return METHODS[choice]()
    if isinstance(choice, type) or not hasattr(choice, "prepare"):
        raise TypeError(
            f"expected {what} to be a name or a recipe such as Direct(); got {choice!r}"
        )
    return choice
