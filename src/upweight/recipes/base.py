"""What a recipe is."""

from __future__ import annotations

from typing import Protocol

from upweight.costs import Cost, Workload
from upweight.inverse import Prepared
from upweight.operator import LinearOperator

__all__ = ["Recipe"]


class Recipe(Protocol):
    """A way to a damped inverse."""

    @property
    def name(self) -> str:
        """The short name, as in ``method="direct"``."""
        ...

    def prepare(self, curvature: LinearOperator) -> Prepared:
        """Everything that does not depend on the damping."""
        ...

    def cost(self, work: Workload) -> Cost:
        """What fit and solve will take."""
        ...
