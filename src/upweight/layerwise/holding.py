"""Test rows solved for and held, block by block, each in the cheapest form.

Letters: n training rows, m test rows, q groups, t and s positions of a test and a training row, o
outputs and i columns of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.curvature import KroneckerInverse
from upweight.layerwise.checking import check_sides
from upweight.layerwise.queries import Formed, Queries, Separable, Weighted
from upweight.layerwise.separable import Split, split_weight
from upweight.layerwise.sides import LayerGradients, Sides
from upweight.risk import EmpiricalRisk

__all__ = ["HELD_BYTES", "Frames", "Held", "held_queries"]

# What the solved test rows of one pass over the training rows may take.
HELD_BYTES = 2**30
# How many test rows of a group show what sums of products in place of weights cost.
SHOWN = 4

Form = Literal["formed", "weighted", "separable"]


@dataclass(frozen=True)
class Held:
    """Some test rows, ready to meet training rows.

    Attributes
    ----------
    rows
        Which ones.
    queries
        One for every block; None for a block that none of them uses.
    exact
        The first few again, without sums of products in place of weights; None where there are
        none.
    facts
        How they are held, in words.
    """

    rows: slice
    queries: Sequence[Queries | None]
    exact: Sequence[Queries | None] | None = None
    facts: Mapping[str, str] = field(default_factory=lambda: {})


def held_queries(
    inverse: KroneckerInverse, test: EmpiricalRisk, train_rows: int, stored: Frames | None = None
) -> Iterator[Held]:
    """The test rows in as large groups as may be held.

    Parameters
    ----------
    inverse
        (C + λI)⁻¹ by blocks.
    test
        The test rows.
    train_rows
        n, how many rows they will meet: what is done once for a test row pays with many.
    stored
        The frames of training rows that come rotated; default: as they come from the model.
    """
    frames = stored or Frames.of(inverse)
    collected: _Collected | None = None
    for chunk, sides in LayerGradients(inverse.curvature, test).chunks():
        check_sides(sides, chunk.start, "test")
        start = 0
        while start < len(chunk):
            if collected is None:
                plans = [
                    _plan(inverse, frames, at, side, test.n, train_rows)
                    for at, side in enumerate(sides)
                ]
                collected = _Collected(inverse, frames, plans, chunk.start + start)
            stop = min(len(chunk), start + collected.room)
            collected.add([None if s is None else s.rows(slice(start, stop)) for s in sides])
            start = stop
            if collected.room == 0 or chunk.start + stop == test.n:
                yield collected.finish()
                collected = None


@dataclass(frozen=True)
class Frames:
    """The coordinates in which the blocks of test and training rows meet.

    Attributes
    ----------
    bases
        Eigenvectors of both sides, or the leading ones of them; None for the identity.
    weights
        1/(Λ + λ) in these coordinates, (q, o, i).
    values
        Λ.
    turned
        Whether training rows come in these coordinates; else in those of the parameters.
    formed
        For every block whether training rows come as gradients, and not as sides.
    """

    bases: Sequence[tuple[Tensor | None, Tensor | None]]
    weights: Sequence[Tensor]
    values: Sequence[Tensor]
    turned: bool
    formed: Sequence[bool]

    @classmethod
    def of(cls, inverse: KroneckerInverse) -> Frames:
        """All eigenvectors, for rows as they come from the model."""
        operators = [block.operator for block in inverse.curvature.blocks]
        return cls(
            [(operator.left, operator.right) for operator in operators],
            inverse.weights,
            [operator.values for operator in operators],
            turned=False,
            formed=[False for _ in operators],
        )


@dataclass(frozen=True)
class _Plan:
    """How the test rows of one block are held, and what one takes."""

    form: Form
    row_bytes: int
    split: Split | None = None


def _plan(  # noqa: PLR0917
    inverse: KroneckerInverse, frames: Frames, at: int, sides: Sides | None, m: int, n: int
) -> _Plan:
    """The form with the fewest operations; among equals the smallest."""
    weight = frames.weights[at]
    q, o, i = weight.shape
    formed_bytes = q * o * i * weight.itemsize
    if sides is None or sides.right is None or frames.formed[at]:
        return _Plan("formed", formed_bytes)
    t = s = sides.positions
    side_bytes = q * t * (o + i) * weight.itemsize
    rotated = 0 if frames.turned else n * s * (o**2 + i**2)
    # multiply-adds of a group, for all rows
    formed = n * (m + s) * o * i + m * (t * o * i + 2 * o * i * (o + i))
    weighted = rotated + n * m * s * o * i
    if inverse.factored is not None:
        each = n * m * s * t * (o + i)
        most = (min(formed, weighted) - rotated) / each
        split = split_weight(frames.values[at], weight, most, inverse.factored)
        if split is not None:
            return _Plan("separable", side_bytes, split)
    if side_bytes < formed_bytes and weighted <= 1.25 * formed:
        return _Plan("weighted", side_bytes)
    return _Plan("formed", formed_bytes)


@dataclass
class _Collected:
    """Test rows of one group, as they come."""

    inverse: KroneckerInverse
    frames: Frames
    plans: Sequence[_Plan]
    start: int
    count: int = 0
    parts: list[list[Sides | Tensor]] = field(default_factory=lambda: [])

    def __post_init__(self) -> None:
        self.parts = [[] for _ in self.plans]
        self._most = max(1, HELD_BYTES // max(1, sum(plan.row_bytes for plan in self.plans)))

    @property
    def room(self) -> int:
        """For how many more rows there is room."""
        return self._most - self.count

    def add(self, sides: Sequence[Sides | None]) -> None:
        """Solve for some rows, or keep what is needed for that."""
        self.count += next((len(s) for s in sides if s is not None), 0)
        for at, (plan, own) in enumerate(zip(self.plans, sides, strict=True)):
            if own is None:
                # a layer may be left out for some rows, which then have no gradient there
                continue
            rotated = own.rotated(*self.frames.bases[at])
            if plan.form != "formed":
                self.parts[at].append(rotated)
                continue
            solved = rotated.formed() * self.frames.weights[at]
            back = self.inverse.block(at).back
            self.parts[at].append(solved if self.frames.turned else back(solved))

    def finish(self) -> Held:
        """The group."""
        queries = [self._queries(at) for at in range(len(self.plans))]
        exact: list[Queries | None] | None = None
        if any(plan.split is not None for plan in self.plans):
            exact = [self._exact(at, query) for at, query in enumerate(queries)]
        rows = slice(self.start, self.start + self.count)
        return Held(rows, queries, exact, _facts(self.plans))

    def _queries(self, at: int) -> Queries | None:
        plan, parts = self.plans[at], self.parts[at]
        if not parts:
            return None
        self.parts[at] = []
        if plan.form == "formed":
            values = [part for part in parts if isinstance(part, Tensor)]
            return Formed(values[0] if len(values) == 1 else torch.cat(values), self._bases(at))
        left, right = _joined([part for part in parts if isinstance(part, Sides)])
        if plan.split is not None:
            return Separable(left, right, plan.split.u, plan.split.v, self._bases(at))
        return Weighted(left, right, self.frames.weights[at], self._bases(at))

    def _bases(self, at: int) -> tuple[Tensor | None, Tensor | None] | None:
        """What training rows have to be rotated by."""
        if self.frames.turned or self.plans[at].form == "formed":
            return None
        return self.frames.bases[at]

    def _exact(self, at: int, query: Queries | None) -> Queries | None:
        if isinstance(query, Formed):
            return Formed(query.values[:SHOWN], query.bases)
        if not isinstance(query, Weighted | Separable):
            return None
        left, right = query.left[:SHOWN], query.right[:SHOWN]
        return Weighted(left, right, self.frames.weights[at], query.bases)


def _facts(plans: Sequence[_Plan]) -> dict[str, str]:
    counted = {form: sum(plan.form == form for plan in plans) for form in get_args(Form)}
    found = {"blocks of test rows": ", ".join(f"{n} {form}" for form, n in counted.items() if n)}
    splits = [plan.split for plan in plans if plan.split is not None]
    if splits:
        ranks = [split.rank for split in splits]
        error = (sum(s.rest for s in splits) / sum(s.size for s in splits)) ** 0.5
        found["factored scores"] = (
            f"{min(ranks)} to {max(ranks)} terms in {len(splits)} of {len(plans)} blocks, expected "
            f"relative error of these {error:.2g}"
        )
    return found


def _joined(parts: Sequence[Sides]) -> tuple[Tensor, Tensor]:
    """Sides of consecutive rows; those with fewer positions get some that count nothing."""
    longest = max(part.positions for part in parts)

    def whole(sides: Sequence[Tensor]) -> Tensor:
        padded = [F.pad(side, (0, 0, 0, longest - side.shape[2])) for side in sides]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    left = whole([part.left for part in parts])
    return left, whole([part.right for part in parts if part.right is not None])
