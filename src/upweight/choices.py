"""Names that `Influence` takes, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from upweight.blocks import BlockChoice
from upweight.curvature import GGN, Fisher, Hessian
from upweight.fitted import Damping
from upweight.inverse import check_damping
from upweight.operator import LinearOperator
from upweight.planning import Auto
from upweight.recipes import Recipe, choose_recipe
from upweight.risk import EmpiricalRisk

__all__ = [
    "CurvatureChoice",
    "check_blocks",
    "check_certify",
    "check_dampings",
    "choose_curvature",
    "choose_method",
]

CURVATURES: dict[str, Callable[[EmpiricalRisk], LinearOperator]] = {
    "ggn": GGN,
    "hessian": Hessian,
    "fisher": Fisher,
}
CurvatureChoice = Literal["ggn", "hessian", "fisher"] | Callable[[EmpiricalRisk], LinearOperator]


def choose_method(choice: str | Recipe) -> Recipe:
    """A recipe from itself, its name, or ``"auto"``."""
    if isinstance(choice, str) and choice == "auto":
        return Auto()
    return choose_recipe(choice)


def choose_curvature(choice: CurvatureChoice) -> Callable[[EmpiricalRisk], LinearOperator]:
    """From a name or a function to the function."""
    if callable(choice):
        return choice
    if choice not in CURVATURES:
        raise ValueError(f"expected curvature to be one of {sorted(CURVATURES)}; got {choice!r}")
    return CURVATURES[choice]


def check_blocks(blocks: Any) -> str | BlockChoice:
    """Refuse blocks that no model can have."""
    if isinstance(blocks, Mapping) or blocks in ("full", "layer", "parameter"):
        return blocks  # pyright: ignore[reportUnknownVariableType]
    raise ValueError(
        "expected blocks to be 'full', 'layer', 'parameter', or a mapping from names to patterns "
        f"such as {{'head': 'head.*'}}; got {blocks!r}"
    )


def check_certify(certify: int | Literal["auto"] | None) -> int | Literal["auto"] | None:
    """Refuse a number of right-hand sides that is none."""
    if certify not in (None, "auto") and (
        isinstance(certify, bool) or not isinstance(certify, int) or certify < 0
    ):
        raise ValueError(
            "expected certify to be how many right-hand sides are measured, at least 0, None for "
            f"all, or 'auto'; got {certify!r}"
        )
    return certify


def check_dampings(damping: Damping, blocks: str | BlockChoice) -> Damping:
    """A damping, or one for each block, as numbers ≥ 0."""
    if not isinstance(damping, Mapping):
        check_damping(damping)
        return float(damping)
    if blocks == "full":
        raise TypeError(
            "expected one number for the damping λ; got one for every block. Say which blocks: "
            "blocks='layer'"
        )
    for value in damping.values():
        check_damping(value)
    return {name: float(value) for name, value in damping.items()}
