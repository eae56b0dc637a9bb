"""What several processes that write one store must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Writers"]


class Writers(Protocol):
    """Processes that write one store together, as a `Cluster` of them."""

    rank: int

    def assign(self, costs: Sequence[float]) -> list[int]:
        """The writer for each of some tasks."""
        ...

    def meet(self, what: str, value: Any = None) -> list[Any]:
        """What every writer has to say."""
        ...

    def tell(self, what: str, value: Any = None) -> Any:
        """What the first writer has to say."""
        ...
