"""What every sampler is: units by number, from the seed and that number alone.

So a run can be continued, cut into rounds of any size and spread over any number of workers, and
asks for the same sets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.samples import Samples

__all__ = ["BLOCK", "Asking", "Floats", "Masks", "Sampler", "blockwise"]

Floats: TypeAlias = NDArray[np.float64]
Masks: TypeAlias = NDArray[np.bool_]

BLOCK = 64  # units that one random generator draws


class Asking(Protocol):
    """Who evaluates: the part of `Evaluator` that samplers need."""

    ends: tuple[float, float]

    def masks(self, masks: Masks) -> Floats:
        """(M,) utilities."""
        ...

    def orders(
        self, orders: NDArray[np.int32], length: int, tolerance: float | None
    ) -> tuple[Floats, NDArray[np.int32]]:
        """(P, n + 1) utilities of beginnings, and how many of each were asked for."""
        ...


class Sampler(ABC):
    """A rule for which sets to ask for. All are frozen dataclasses of a few options."""

    name: ClassVar[str]

    @abstractmethod
    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> Samples:
        """Draw the units of that number, and have them evaluated; `tolerance` as of orders."""

    @abstractmethod
    def blank(self, law: Floats) -> Samples:
        """Samples of no units."""

    @abstractmethod
    def cost(self, law: Floats) -> int:
        """Evaluations that a unit takes, at most."""

    def check(self, law: Floats) -> None:
        """A ValueError where nothing can be learnt of the law from such samples."""
        if not len(law):
            raise ValueError("expected some rows to sample from; got none")

    def to_dict(self) -> dict[str, Any]:
        """Name and options, for `sampler_from`."""
        options: dict[str, Any] = asdict(self)  # pyright: ignore[reportArgumentType]
        return {"name": self.name, **options}


def blockwise(
    seed: int, units: range, draw: Callable[[np.random.Generator], NDArray[Any]]
) -> NDArray[Any]:
    """Units by number: block b of them comes from the b-th generator spawned from the seed."""
    blocks = range(units.start // BLOCK, -(-units.stop // BLOCK))
    drawn = np.concatenate(
        [
            draw(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(block,))))
            for block in blocks
        ]
    )
    first = blocks.start * BLOCK
    return drawn[units.start - first : units.stop - first]
